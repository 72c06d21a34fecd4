"""Module: a tree of parameters, buffers and further modules, found by attribute assignment."""

import difflib

import numpy as np

from xuracore import versions
from xuracore.errors import DTypeError, XuraError
from xuracore.tensor import FLOATS, Handle, Tensor


class Parameter(Tensor):
    """A Tensor that a Module owns and trains: contiguous, and writable for the optimizer.

    ``name`` is the longest path under which :meth:`Module.named_parameters` has listed it, for messages.
    """

    __slots__ = ("name",)

    def __init__(self, data, requires_grad=True):
        super().__init__(data)
        self.name = None
        self.data = np.require(self.data, requirements=("C", "W"))
        self.requires_grad_(requires_grad)


class StateDictError(XuraError, KeyError):
    """The names or shapes of a state do not fit a module; the message lists every difference."""

    def __str__(self):
        return self.args[0]


class Module:
    """Base of every layer and model.

    Attributes that are Parameters, Modules or arrays marked with :meth:`register_buffer` make up the
    state, named by their path (``layers.0.norm.weight``); names that begin with ``_`` are left out.  One
    Parameter under two names is *tied*: it counts once, and is saved under its first name.
    """

    training = True
    _hooks = None  # or two dicts of functions, called before and after forward

    def __setattr__(self, name, value):
        if isinstance(value, (list, tuple, dict)) and not name.startswith("_"):
            items = value.values() if isinstance(value, dict) else value
            if any(isinstance(item, (Module, Parameter)) for item in items):
                raise DTypeError(
                    f"{type(self).__name__}.{name} is a {type(value).__name__} of modules or parameters, "
                    "which nobody would train or save: use ModuleList, or a name that begins with '_'"
                )
        super().__setattr__(name, value)

    def __call__(self, *arguments, **keywords):
        if self._hooks is not None:
            return self._call_with_hooks(arguments, keywords)
        return self.forward(*arguments, **keywords)

    def _call_with_hooks(self, arguments, keywords):
        before, after = self._hooks
        for hook in list(before.values()):
            changed = hook(self, arguments)
            if changed is not None:
                arguments = changed if isinstance(changed, tuple) else (changed,)
        result = self.forward(*arguments, **keywords)
        for hook in list(after.values()):
            changed = hook(self, arguments, result)
            result = result if changed is None else changed
        return result

    def register_forward_pre_hook(self, hook):
        """Call ``hook(module, arguments)`` before each forward; what it returns, if not None, are the arguments.

        Returns a handle: ``handle.remove()``, or ``with module.register_forward_pre_hook(f):``.
        """
        return self._register(0, hook)

    def register_forward_hook(self, hook):
        """Call ``hook(module, arguments, result)`` after each forward; what it returns, if not None, is the result.

        Returns a handle: ``handle.remove()``, or ``with module.register_forward_hook(f):``.
        """
        return self._register(1, hook)

    def _register(self, place, hook):
        if self._hooks is None:
            self._hooks = {}, {}
        return Handle(self._hooks[place], hook)

    def forward(self, *arguments, **keywords):
        """What the module computes; called through ``module(...)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def register_buffer(self, name, array):
        """Keep a copy of an array in the state that is not trained (running statistics, tables)."""
        self.__dict__.setdefault("_buffers", set()).add(name)
        setattr(self, name, np.array(array))

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
        """This module and everything below it."""
        return (module for _, module in self.named_modules())

    def _all_parameters(self):
        """(path, Parameter) under every name, tied ones included."""
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and not name.startswith("_"):
                    yield f"{path}.{name}" if path else name, value

    def named_parameters(self):
        """(path, Parameter), each Parameter once."""
        seen = set()
        for name, parameter in self._all_parameters():
            if parameter not in seen:
                seen.add(parameter)
                if not (parameter.name or "").endswith(name):
                    parameter.name = name
                yield name, parameter

    def aliases(self):
        """{further name of a tied parameter: its first name}: what a file's metadata should remember."""
        first = {parameter: name for name, parameter in self.named_parameters()}
        return {name: first[p] for name, p in self._all_parameters() if name != first[p]}

    def parameters(self):
        """Each Parameter once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self):
        """(path, array) of each registered buffer."""
        for path, module in self.named_modules():
            for name in vars(module):
                if name in vars(module).get("_buffers", ()):
                    yield f"{path}.{name}" if path else name, getattr(module, name)

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

        strict : every name must be there, and no other; a tied parameter may come under any of its
            names.  Shapes must match in any case, and integers take no fractions.  All differences are
            collected first, so nothing is changed when StateDictError is raised.
        Returns (missing, unexpected) lists of names.
        """
        given, missing, unexpected = self.match_state_dict(state, strict)
        own = self.state_dict()
        for name, values in given.items():
            own[name][...] = values
            versions.changed(own[name], name)
        return missing, unexpected

    def match_state_dict(self, state, strict=True):
        """({own name: value}, missing, unexpected) as ``load_state_dict`` would take ``state``; copies nothing.

        Of the values only ``shape`` and ``dtype`` are looked at.  Raises StateDictError as ``load_state_dict``.
        """
        own = self.state_dict()
        first = {parameter: name for name, parameter in self.named_parameters()}
        names = {name: first[parameter] for name, parameter in self._all_parameters()}
        names.update((name, name) for name in own)
        given = {names[name]: state[name] for name in reversed(list(state)) if name in names}
        given.update((name, state[name]) for name in own if name in state)  # the first name counts most
        unexpected = [name for name in state if name not in names]
        missing = [name for name in own if name not in given]
        misshapen = [
            f"{name}: file {tuple(state[name].shape)}, model {own[names[name]].shape}"
            for name in state
            if name in names and tuple(state[name].shape) != own[names[name]].shape
        ]
        mistyped = [
            f"{name}: file {state[name].dtype}, model {own[names[name]].dtype}"
            for name in state
            if name in names and not np.can_cast(state[name].dtype, own[names[name]].dtype, "same_kind")
        ]
        if misshapen or mistyped or strict and (missing or unexpected):
            kinds = {"wrong shape": misshapen, "wrong dtype": mistyped}
            if strict:
                kinds = {"unexpected": unexpected, "missing": missing, **kinds}
            lines = [f"the state does not fit {type(self).__name__}:"]
            lines += [f"  {kind} ({len(some)}): " + ", ".join(some) for kind, some in kinds.items() if some]
            for name in unexpected[:3]:
                near = difflib.get_close_matches(name, missing, 1)
                if near:
                    lines.append(f"  perhaps {name!r} is meant to be {near[0]!r}")
            raise StateDictError("\n".join(lines))
        return given, missing, unexpected

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
        """Convert parameters and floating-point buffers to float32 or float64; returns the module."""
        if np.dtype(dtype) not in FLOATS:
            raise DTypeError(f"modules compute in float32 or float64, not {np.dtype(dtype)}")
        for parameter in self.parameters():
            trained = parameter.requires_grad
            parameter.node = None
            parameter.data = parameter.data.astype(dtype)
            parameter.requires_grad_(trained)
        for module in self.modules():
            for name in vars(module).get("_buffers", ()):
                if getattr(module, name).dtype.kind == "f":
                    setattr(module, name, getattr(module, name).astype(dtype))
        return self

    def __repr__(self):
        lines = self._tree("", {}, self.aliases())
        if len(lines) > 1:
            count, trained = self.parameter_count(), self.parameter_count(trainable_only=True)
            size = sum(array.nbytes for array in self.state_dict().values())
            frozen = f", {count - trained:,} frozen" if trained < count else ""
            size = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
            lines.append(f"{count:,} parameters{frozen}; {size} with buffers")
        return "\n".join(lines)

    def _tree(self, path, seen, aliases):
        """The lines of ``repr``; parameters and buffers stand alone where no ``extra_repr`` tells their shapes."""
        count = self.parameter_count()
        trained = self.parameter_count(trainable_only=True)
        frozen = "" if trained == count else ", frozen" if not trained else f", {count - trained:,} frozen"
        about = self.extra_repr()
        lines = [f"{type(self).__name__}({about})  {count:,} parameters{frozen}"]
        buffers = vars(self).get("_buffers", ())
        for name, value in vars(self).items():
            full = f"{path}.{name}" if path else name
            if name.startswith("_"):
                continue
            if isinstance(value, Module):
                if id(value) in seen:
                    lines.append(f"  ({name}): the same as {seen[id(value)]}")
                    continue
                seen[id(value)] = full
                head, *rest = value._tree(full, seen, aliases)
                lines += [f"  ({name}): {head}"] + [f"  {line}" for line in rest]
            elif isinstance(value, Parameter) and full in aliases:
                lines.append(f"  {name}: tied to {aliases[full]}")
            elif isinstance(value, Parameter) and not about:
                lines.append(f"  {name}: {value.shape}" + ("" if value.requires_grad else ", frozen"))
            elif name in buffers:
                lines.append(f"  {name}: buffer {value.shape} {value.dtype}")
        return lines

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
        """Add one at the end."""
        if not isinstance(module, Module):
            raise DTypeError(f"ModuleList holds modules; got {type(module).__name__}")
        setattr(self, str(self._length), module)
        self._length += 1

    def __len__(self):
        return self._length

    def __iter__(self):
        return (vars(self)[str(i)] for i in range(self._length))

    def __getitem__(self, index):
        """One module, or a list of them for a slice."""
        place = range(self._length)[index]
        return [vars(self)[str(i)] for i in place] if isinstance(index, slice) else vars(self)[str(place)]
