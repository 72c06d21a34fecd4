"""Optimizers, gradient clipping and averaged weights.

    groups = parameter_groups(model, weight_decay=0.05, lr_scales={"y_encoder": 0.05})
    optimizer = AdamW(groups, lr=3e-4)
    loss.backward()
    clip_grad_norm(optimizer.parameters(), 1.0)
    optimizer.step(schedule(step))
    optimizer.zero_grad()

Every optimizer takes the rate of the step as an argument, so that a schedule is a pure function of the
step number and nothing has to be replayed on resume.  The updates are those of the ``torch.optim``
classes of the same names (Lion after its paper); the state is a flat dict of arrays.
"""

import contextlib
import math
from dataclasses import dataclass

import numpy as np

from xuracore import versions
from xuracore.errors import ConfigError, FormatError
from xuracore.kernels.optimizer import adamw_update, sum_of_squares
from xuracore.nn import Module

# state-space parameters whose size carries meaning, and single numbers such as temperatures
NEVER_DECAYED = {
    "A_log", "A_real", "A_imag", "log_A_real", "D", "dt_bias", "log_dt", "inv_dt",
    "temperature", "log_scale", "logit_scale", "cls_token", "pos_embed", "position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share settings.  ``lr_scale`` multiplies the rate of every step."""

    names: tuple
    parameters: tuple
    lr_scale: float = 1.0
    weight_decay: float = 0.0


def decays(name, parameter):
    """Whether weight decay makes sense: for matrices that are neither bias, norm nor state-space."""
    parts = name.split(".")
    return (
        parameter.ndim >= 2
        and not parts[-1].endswith("bias")
        and parts[-1] not in NEVER_DECAYED
        and not any("norm" in part for part in parts)
    )


def parameter_groups(module, weight_decay=0.0, lr_scales=None):
    """Groups of the trainable parameters of ``module``: decayed or not (see :func:`decays`), by rate.

    lr_scales : {prefix of the name: factor}, such as ``{"y_encoder": 0.05}``; the longest prefix that
        fits counts.  A factor of 0 leaves those parameters out.  ConfigError for a prefix that fits
        nothing: a misspelt name must not train at the full rate.
    """
    lr_scales = dict(lr_scales or {})
    sorted_parameters, used = {}, set()
    for name, parameter in module.named_parameters():
        fitting = [prefix for prefix in lr_scales if name == prefix or name.startswith(prefix + ".")]
        prefix = max(fitting, key=len, default=None)
        used.update(fitting)
        scale = 1.0 if prefix is None else float(lr_scales[prefix])
        if parameter.requires_grad and scale:
            key = scale, weight_decay if decays(name, parameter) else 0.0
            sorted_parameters.setdefault(key, []).append((name, parameter))
    unknown = set(lr_scales) - used
    if unknown:
        raise ConfigError(f"lr_scales: no parameter is named {', '.join(sorted(unknown))}")
    return [
        ParameterGroup(*map(tuple, zip(*members)), lr_scale=scale, weight_decay=decay)
        for (scale, decay), members in sorted_parameters.items()
    ]


def _as_groups(parameters, weight_decay):
    if isinstance(parameters, Module):
        parameters = [(name, p) for name, p in parameters.named_parameters() if p.requires_grad]
    parameters = list(parameters)
    if parameters and all(isinstance(group, ParameterGroup) for group in parameters):
        groups = parameters
    else:
        pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(parameters)]
        groups = [ParameterGroup(*map(tuple, zip(*pairs)), weight_decay=weight_decay)] if pairs else []
    names = [name for group in groups for name in group.names]
    if not names:
        raise ConfigError("an optimizer needs at least one parameter that requires gradients")
    identities = {id(p) for group in groups for p in group.parameters}
    if len(set(names)) < len(names) or len(identities) < len(names):
        raise ConfigError("a parameter or a name appears twice among the parameters of the optimizer")
    return groups


class Optimizer:
    """Base class: groups, the loop over parameters, and the state.

    parameters : a Module, ParameterGroups, Parameters, or (name, Parameter) pairs.
    lr : the rate of a step that is not given one.
    weight_decay : for parameters that come without groups; groups bring their own.
    """

    slots = ()  # names of the arrays kept beside each parameter

    def __init__(self, parameters, lr, weight_decay=0.0):
        if not lr >= 0 or not weight_decay >= 0:
            raise ConfigError(f"lr={lr} and weight_decay={weight_decay} must not be negative")
        self.lr = lr
        self.groups = _as_groups(parameters, weight_decay)
        self._state, self._steps = {}, {}
        for name, parameter in self.named_parameters():
            if not (parameter.data.flags.c_contiguous and parameter.data.flags.writeable):
                parameter.data = np.array(parameter.data, order="C")  # updates are in place
            self._state[name] = self._blank(parameter.data)
            self._steps[name] = 0

    def named_parameters(self):
        """(name, Parameter) of everything that is optimised."""
        return ((n, p) for group in self.groups for n, p in zip(group.names, group.parameters))

    def parameters(self):
        return (parameter for _, parameter in self.named_parameters())

    def _blank(self, data):
        return {slot: np.zeros_like(data) for slot in self.slots}

    def zero_grad(self):
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def step(self, lr=None):
        """Change every parameter that has a gradient, in place, with rate ``lr``."""
        lr = self.lr if lr is None else lr
        for group in self.groups:
            for name, parameter in zip(group.names, group.parameters):
                if parameter.grad is not None:
                    self._steps[name] += 1
                    gradient = np.ascontiguousarray(parameter.grad).reshape(parameter.shape)
                    settings = float(lr) * group.lr_scale, group.weight_decay, self._steps[name]
                    self._update(parameter.data, gradient, *settings, **self._state[name])
                    versions.changed(parameter.data, name)

    def _update(self, data, grad, rate, decay, step, **slots):
        """Change ``data`` and ``slots`` in place; ``step`` counts from 1."""
        raise NotImplementedError

    def state_dict(self):
        """{"slot.parameter": array (not copied), "steps": how often each parameter was updated}."""
        state = {f"{slot}.{name}": a for name, slots in self._state.items() for slot, a in slots.items()}
        state["steps"] = np.array(list(self._steps.values()), np.int64)
        return state

    def load_state_dict(self, state):
        """Copy ``state`` into this optimizer; FormatError lists what does not fit, before any change."""
        own = self.state_dict()
        wrong = [f"missing {key}" for key in own if key not in state]
        wrong += [f"unexpected {key}" for key in state if key not in own]
        wrong += [
            f"{key} has shape {state[key].shape}, expected {own[key].shape}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        if wrong:
            listed = "; ".join(wrong[:8]) + (" …" if len(wrong) > 8 else "")
            raise FormatError(f"the state does not fit this {type(self).__name__}: {listed}")
        for key, target in own.items():
            target[...] = state[key]
        self._steps = dict(zip(self._steps, state["steps"].tolist()))


def _betas(betas):
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas={betas}; expected two numbers in [0, 1)")
    return tuple(map(float, betas))


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), one fused pass per parameter."""

    slots = ("mean", "square")

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(parameters, lr, weight_decay)
        self.betas, self.eps = _betas(betas), float(eps)

    def _update(self, data, grad, rate, decay, step, mean, square):
        beta1, beta2 = self.betas
        corrections = 1 - beta1**step, 1 - beta2**step
        flat = [a.reshape(-1) for a in (data, grad, mean, square)]
        adamw_update.sized(10 * data.size)(*flat, rate, beta1, beta2, self.eps, float(decay), *corrections)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015).  Weight decay is L2: added to the gradient.

    amsgrad : divide by the largest second moment so far (Reddi et al. 2018).
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
        self.slots = ("mean", "square", "largest") if amsgrad else ("mean", "square")
        super().__init__(parameters, lr, weight_decay)
        self.betas, self.eps = _betas(betas), float(eps)

    def _update(self, data, grad, rate, decay, step, mean, square, largest=None):
        beta1, beta2 = self.betas
        grad = grad + decay * data if decay else grad
        mean += (1 - beta1) * (grad - mean)
        square *= beta2
        square += (1 - beta2) * grad * grad
        if largest is not None:
            np.maximum(largest, square, out=largest)
            square = largest
        scale = np.sqrt(square) / math.sqrt(1 - beta2**step) + self.eps
        data -= rate / (1 - beta1**step) * mean / scale


class SGD(Optimizer):
    """Gradient descent with momentum: b ← momentum·b + (1 - dampening)·g, the first b being g."""

    def __init__(self, parameters, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        if nesterov and (momentum <= 0 or dampening):
            raise ConfigError("nesterov needs a positive momentum and no dampening")
        self.slots = ("momentum",) if momentum else ()
        super().__init__(parameters, lr, weight_decay)
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov

    def _update(self, data, grad, rate, decay, step, momentum=None):
        grad = grad + decay * data if decay else grad
        if momentum is not None:
            momentum *= self.momentum
            momentum += grad if step == 1 else (1 - self.dampening) * grad
            grad = grad + self.momentum * momentum if self.nesterov else momentum
        data -= rate * grad


class RMSprop(Optimizer):
    """Divides by a running root mean square (Hinton 2012).

    centered : subtract the squared running mean first.   momentum : averages the divided gradient.
    """

    def __init__(
        self, parameters, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False
    ):
        self.slots = ("square",) + ("mean",) * bool(centered) + ("momentum",) * bool(momentum)
        super().__init__(parameters, lr, weight_decay)
        self.alpha, self.eps, self.momentum = alpha, eps, momentum

    def _update(self, data, grad, rate, decay, step, square, mean=None, momentum=None):
        grad = grad + decay * data if decay else grad
        square *= self.alpha
        square += (1 - self.alpha) * grad * grad
        variance = square
        if mean is not None:
            mean += (1 - self.alpha) * (grad - mean)
            variance = np.maximum(square - mean * mean, 0)  # rounding must not make it negative
        direction = grad / (np.sqrt(variance) + self.eps)
        if momentum is not None:
            momentum *= self.momentum
            momentum += direction
            direction = momentum
        data -= rate * direction


class Lion(Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023), decoupled weight decay."""

    slots = ("mean",)

    def __init__(self, parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(parameters, lr, weight_decay)
        self.betas = _betas(betas)

    def _update(self, data, grad, rate, decay, step, mean):
        beta1, beta2 = self.betas
        direction = np.sign(beta1 * mean + (1 - beta1) * grad)
        data *= 1 - rate * decay
        data -= rate * direction
        mean *= beta2
        mean += (1 - beta2) * grad


class Adagrad(Optimizer):
    """Divides by the root of the summed squares (Duchi et al. 2011)."""

    slots = ("square",)

    def __init__(self, parameters, lr=1e-2, lr_decay=0.0, weight_decay=0.0, eps=1e-10):
        super().__init__(parameters, lr, weight_decay)
        self.lr_decay, self.eps = lr_decay, eps

    def _update(self, data, grad, rate, decay, step, square):
        grad = grad + decay * data if decay else grad
        square += grad * grad
        data -= rate / (1 + (step - 1) * self.lr_decay) * grad / (np.sqrt(square) + self.eps)


class Adafactor(Optimizer):
    """Second moments of a matrix from its row and column means (Shazeer & Stern 2018).

    The step is relative: rate·max(eps[1], rms(parameter)), and the update's own root mean square is
    held at ``d``.  eps[0] None is the dtype's machine epsilon.  β₂ at step t is 1 - t^beta2_decay.
    """

    def __init__(self, parameters, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
        super().__init__(parameters, lr, weight_decay)
        self.beta2_decay, self.eps, self.d = beta2_decay, eps, d

    def _blank(self, data):
        if data.ndim < 2:
            return {"square": np.zeros_like(data)}
        return {
            "row": np.zeros_like(data[..., :1]),
            "column": np.zeros_like(data[..., :1, :]),
        }

    def _update(self, data, grad, rate, decay, step, square=None, row=None, column=None):
        tiny = float(np.finfo(data.dtype).eps) if self.eps[0] is None else self.eps[0]
        fresh = step**self.beta2_decay
        size = max(self.eps[1], _root_mean_square(data)) * min(rate, 1 / math.sqrt(step))
        data *= 1 - rate * decay
        squared = grad * grad
        if square is None:
            row += fresh * (np.mean(squared, axis=-1, keepdims=True) - row)
            column += fresh * (np.mean(squared, axis=-2, keepdims=True) - column)
            estimate = row * column / np.maximum(np.mean(row, axis=-2, keepdims=True), tiny)
        else:
            square += fresh * (squared - square)
            estimate = square
        update = grad / np.sqrt(np.maximum(estimate, tiny * tiny))
        data -= size / max(1.0, _root_mean_square(update) / self.d) * update


def _root_mean_square(x):
    return math.sqrt(np.mean(np.square(x, dtype=np.float64))) if x.size else 0.0


def grad_norm(parameters):
    """Euclidean norm of all gradients together, in float64; parameters without gradient do not count."""
    part, total = np.zeros(1), 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            sum_of_squares(np.ascontiguousarray(parameter.grad).reshape(-1), part)
            total += float(part[0])
    return math.sqrt(total)


def clip_grad_norm(parameters, max_norm):
    """Scale all gradients so that their common norm is at most ``max_norm``; returns the norm before.

    The factor is max_norm / (norm + 1e-6), capped at 1.  Gradients that are not finite stay as they
    are: it is for the caller to skip the step.
    """
    parameters = list(parameters)
    norm = grad_norm(parameters)
    factor = max_norm / (norm + 1e-6)
    if factor < 1 and math.isfinite(norm):
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad * factor
    return norm


class ExponentialMovingAverage:
    """Averaged copies of parameters: a ← a + (1 - decay)(parameter - a), after every step.

    named_parameters : (name, Parameter) pairs.  The first updates average faster, with decay at most
    (1 + n) / (10 + n) at update n, so that the random start is soon forgotten.
    """

    def __init__(self, named_parameters, decay=0.999):
        if not 0 <= decay < 1:
            raise ConfigError(f"decay of averaged weights is {decay}; expected a number in [0, 1)")
        self.decay, self.updates = float(decay), 0
        self._parameters = dict(named_parameters)
        self.averages = {name: p.data.copy() for name, p in self._parameters.items()}

    def update(self):
        """Take the parameters as they are now into the average."""
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in self._parameters.items():
            self.averages[name] += share * (parameter.data - self.averages[name])

    @contextlib.contextmanager
    def applied(self):
        """Within ``with average.applied():`` the parameters hold their averages."""
        kept = {name: p.data.copy() for name, p in self._parameters.items()}
        try:
            self.adopt()
            yield self
        finally:
            for name, parameter in self._parameters.items():
                parameter.data[...] = kept[name]
                versions.changed(parameter.data, name)

    def adopt(self):
        """Copy the averages into the parameters, for good."""
        for name, parameter in self._parameters.items():
            parameter.data[...] = self.averages[name]
            versions.changed(parameter.data, name)

    def state_dict(self):
        """{"average.name": array, "updates": count}."""
        state = {f"average.{name}": array for name, array in self.averages.items()}
        state["updates"] = np.array(self.updates, np.int64)
        return state

    def load_state_dict(self, state):
        """Copy ``state`` into the averages; FormatError where names or shapes differ."""
        own = self.state_dict()
        fits = own.keys() == state.keys() and all(own[k].shape == state[k].shape for k in own)
        if not fits:
            raise FormatError("the averaged weights do not fit these parameters")
        for name, target in self.averages.items():
            target[...] = state[f"average.{name}"]
        self.updates = int(state["updates"])
