"""Modules made of modules, and the activations as modules, to stand in a row."""

from xuracore import ops
from xuracore.errors import ConfigError, DTypeError
from xuracore.nn.module import Module, ModuleList


class Sequential(ModuleList):
    """Modules one after another: each takes what the one before returns.  State names are positions."""

    def __init__(self, *modules):
        super().__init__(modules)

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class ModuleDict(Module):
    """Modules by name; the names are those of the state.

    Raises ConfigError for a name that is no identifier, or that a module already uses for itself.
    """

    def __init__(self, modules=None):
        self._names = []
        for name, module in dict(modules or {}).items():
            self[name] = module

    def __setitem__(self, name, module):
        if not isinstance(module, Module):
            raise DTypeError(f"ModuleDict holds modules; got {type(module).__name__}")
        if not isinstance(name, str) or not name.isidentifier() or name[0] == "_" or hasattr(type(self), name):
            raise ConfigError(f"ModuleDict: {name!r} cannot name a module; expected an identifier without leading "
                              "'_' that is no attribute of ModuleDict")
        if name not in self._names:
            self._names.append(name)
        setattr(self, name, module)

    def __getitem__(self, name):
        if name not in self._names:
            raise KeyError(name)
        return vars(self)[name]

    def __contains__(self, name):
        return name in self._names

    def __len__(self):
        return len(self._names)

    def __iter__(self):
        return iter(self._names)

    def keys(self):
        """The names, in order of addition."""
        return tuple(self._names)

    def values(self):
        """The modules, in order of addition."""
        return tuple(self[name] for name in self._names)

    def items(self):
        """(name, module), in order of addition."""
        return tuple((name, self[name]) for name in self._names)


class Identity(Module):
    """Gives back what it is given."""

    def forward(self, x):
        return x


class Flatten(Module):
    """All axes from ``start`` to ``end``, both included, as one; by default all but the batch."""

    def __init__(self, start=1, end=-1):
        self.start, self.end = start, end

    def forward(self, x):
        return ops.flatten(x, self.start, self.end)

    def extra_repr(self):
        return f"{self.start} to {self.end}"


ACTIVATIONS = {
    "relu": ops.relu, "gelu": ops.gelu, "silu": ops.silu, "tanh": ops.tanh, "sigmoid": ops.sigmoid,
    "softplus": ops.softplus, "elu": ops.elu, "leaky_relu": ops.leaky_relu, "mish": ops.mish,
    "hardswish": ops.hardswish, "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"), "identity": lambda x: x,
}  # fmt: skip


def activation(name):
    """The function called ``name``; ConfigError, with the names there are, if there is none."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _activation_module(class_name, name):
    def forward(self, x):
        return ACTIVATIONS[name](x)

    explanation = f":func:`xuracore.ops.{name}` as a module."
    members = {"forward": forward, "__doc__": explanation, "__module__": __name__, "__qualname__": class_name}
    return type(class_name, (Module,), members)


ReLU, GELU, SiLU = (_activation_module(name, name.lower()) for name in ("ReLU", "GELU", "SiLU"))
Tanh, Sigmoid = (_activation_module(name, name.lower()) for name in ("Tanh", "Sigmoid"))
