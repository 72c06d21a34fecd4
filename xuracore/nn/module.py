"""Module: a tree of parameters, buffers and further modules, found by attribute assignment."""

import difflib

import numpy as np

from xuracore.errors import ShapeError, XuraError
from xuracore.tensor import Tensor


class Parameter(Tensor):
    """A Tensor that a Module owns and trains."""

    __slots__ = ()

    def __init__(self, data, requires_grad=True):
        super().__init__(np.asarray(data, order="C"), requires_grad)  # ascontiguousarray would make 0-d 1-d


class StateDictError(XuraError, KeyError):
    """The names or shapes of a state do not fit a module; the message lists every difference."""

    def __str__(self):
        return self.args[0]


class Module:
    """Base of every layer and model.

    Attributes that are Parameters, Modules or arrays marked with :meth:`register_buffer` make up the
    state, named by their path (``layers.0.norm.weight``).  One Parameter under two names is *tied*:
    it counts once, and is saved under its first name.
    """

    training = True

    def __call__(self, *arguments, **keywords):
        return self.forward(*arguments, **keywords)

    def forward(self, *arguments, **keywords):
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def register_buffer(self, name, array):
        """Keep an array in the state that is not trained (running statistics, tables)."""
        self.__dict__.setdefault("_buffers", set()).add(name)
        setattr(self, name, np.asarray(array))

    # ------------------------------------------------------------------ the tree
    def children(self):
        """(name, module) of each direct child, in order of assignment."""
        for name, value in vars(self).items():
            if isinstance(value, Module) and not name.startswith("_"):
                yield name, value

    def named_modules(self, prefix=""):
        """(path, module) of this module and everything below it."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def modules(self):
        return (module for _, module in self.named_modules())

    def _named(self, kind, tied=False):
        seen = set()
        for path, module in self.named_modules():
            buffers = vars(module).get("_buffers", ())
            for name, value in vars(module).items():
                wanted = isinstance(value, Parameter) if kind == "parameter" else name in buffers
                if wanted and (tied or id(value) not in seen):
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def named_parameters(self):
        """(path, Parameter), each Parameter once."""
        return self._named("parameter")

    def parameters(self):
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self):
        return self._named("buffer")

    def parameter_count(self, trainable_only=False):
        """Number of trained numbers; tied ones once."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not trainable_only)

    # ------------------------------------------------------------------ the state
    def state_dict(self):
        """{path: array} of parameters and buffers (the arrays themselves, not copies)."""
        state = {name: parameter.data for name, parameter in self.named_parameters()}
        state.update(self.named_buffers())
        return state

    def load_state_dict(self, state, strict=True):
        """Copy ``state`` into the parameters and buffers.

        strict : every name must be there, and no other.  Shapes must match in any case.  All
            differences are collected first, so nothing is changed when StateDictError is raised.
        Returns (missing, unexpected) lists of names.
        """
        own = self.state_dict()
        aliases = {name: value for name, value in self._named("parameter", tied=True) if name not in own}
        unexpected = [name for name in state if name not in own and name not in aliases]
        missing = [name for name in own if name not in state]
        misshapen = [
            f"{name}: file {tuple(state[name].shape)}, model {own[name].shape}"
            for name in own
            if name in state and tuple(state[name].shape) != own[name].shape
        ]
        if misshapen or strict and (missing or unexpected):
            lines = [f"the state does not fit {type(self).__name__}:"]
            for title, names in (("unexpected", unexpected), ("missing", missing), ("wrong shape", misshapen)):
                if names and (strict or title == "wrong shape"):
                    some = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
                    lines.append(f"  {title} ({len(names)}): {some}")
            for name in unexpected[:3]:
                near = difflib.get_close_matches(name, missing, 1)
                if near:
                    lines.append(f"  perhaps {name!r} is meant to be {near[0]!r}")
            raise StateDictError("\n".join(lines))
        for name, target in own.items():
            if name in state:
                target[...] = state[name]
        return missing, unexpected

    # ------------------------------------------------------------------ switches
    def train(self, mode=True):
        """Training behaviour (dropout on); returns the module."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        """Inference behaviour; returns the module."""
        return self.train(False)

    def requires_grad_(self, value=True):
        """Train (True) or freeze (False) every parameter below; returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad_(value)
        return self

    def zero_grad(self):
        """Forget the gradients."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.grad = None

    def to_dtype(self, dtype):
        """Convert every parameter to float32 or float64 (for gradient checks); returns the module."""
        for parameter in self.parameters():
            trained = parameter.requires_grad
            parameter.node = None
            parameter.data = parameter.data.astype(dtype)
            parameter.requires_grad_(trained)
        return self

    def __repr__(self):
        lines = [f"{type(self).__name__}({self.extra_repr()})  {self.parameter_count():,} parameters"]
        for name, child in self.children():
            lines += [("  " if i else f"  ({name}): ") + line for i, line in enumerate(repr(child).splitlines())]
        return "\n".join(lines)

    def extra_repr(self):
        """What stands between the brackets in ``repr``."""
        return ""


class ModuleList(Module):
    """Modules in a row; its state names are their positions."""

    def __init__(self, modules=()):
        self._length = 0
        for module in modules:
            self.append(module)

    def append(self, module):
        if not isinstance(module, Module):
            raise ShapeError(f"ModuleList holds modules; got {type(module).__name__}")
        setattr(self, str(self._length), module)
        self._length += 1

    def __len__(self):
        return self._length

    def __iter__(self):
        return (vars(self)[str(i)] for i in range(self._length))

    def __getitem__(self, index):
        return vars(self)[str(range(self._length)[index])]
