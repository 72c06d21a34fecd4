"""Inference: sessions that keep their state, a router over backends, int8 weights.

    router = InferenceRouter.from_pretrained("runs/wavecore/model")
    session = router.session()
    y, about = router.infer(obs, action, reward, session=session)

Backends: ``numba``, the fused kernel; ``numpy``, the model itself on plain arrays.  "auto" takes the first that
can run this model, and a backend that is asked for but cannot run falls back to numpy, which always can.
"""

import time

import numpy as np

from xuracore import jit
from xuracore.config import require
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuramamba.wavecore import fused_step
from xuramamba.wavecore.checkpoint import load_model
from xuramamba.wavecore.model import CoreState, inference_variables
from xuramamba.wavecore.parameters import flatten, map_leaves, unflatten

BACKENDS = ("numba", "numpy")
LARGEST = 1e6  # squares and sums of larger inputs could leave float32, and so spoil the state
ALIASES = {"cpu": "auto", "gpu": "auto", "tpu": "auto", "hailo": "auto"}  # accelerators of the seed: none here


class Session:
    """One stream of steps: its state, and how many steps it took.

    timestamp : of the last step, where steps have one; time never goes back.
    """

    def __init__(self, model):
        self._model = model
        self.reset()

    def reset(self):
        """Forget everything, as at the beginning of an episode."""
        self.state = self._model.initial_state(1)
        self._flat = None
        self.steps, self.timestamp = 0, None

    def as_flat(self):
        """The state as the kernel takes it, by which it is then changed in place."""
        if self._flat is None:
            parts = [np.array(x[0]) for x in self.state[:3]]
            self._flat = parts + [np.concatenate([x.ravel() for x in part]) for part in self.state[3:]]
        return self._flat

    def as_state(self):
        """The state as a CoreState of batch 1."""
        if self._flat is not None:
            c, (s, w, p, *flat) = self._model.config, self._flat
            shapes = [[(1, n, d) for n, d in zip(c.cms_sizes, c.cms_dims)], [(1, n, c.d_k) for n in c.cms_sizes],
                      [(1, n) for n in c.cms_sizes]]
            parts = [[x.reshape(shape) for x, shape in zip(_split(values, row), row)]
                     for values, row in zip(flat, shapes)]
            self.state, self._flat = CoreState(s[None], w[None], p[None], *parts), None
        return self.state


def _split(values, shapes):
    return np.split(values, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])


class InferenceRouter:
    """Runs a model step by step for any number of sessions.

    variables : {"params": tree}; a plain copy is kept.   backend : "auto", "numba" or "numpy" (the seed's
    names cpu, gpu, tpu and hailo are taken for "auto": there is no such device here).
    """

    def __init__(self, model, variables, backend="auto"):
        self.model, self.variables = model, inference_variables(variables, np.float32)
        self.backend = self._settled(backend)
        self._packed = None
        self.default_session = Session(model)

    @classmethod
    def from_pretrained(cls, folder, backend="auto"):
        """Of a folder written by ``save_model``, or an export of ``export_model``."""
        from xuramamba.wavecore.export import is_export, load_export

        return cls(*(load_export if is_export(folder) else load_model)(folder), backend)

    def session(self):
        """A new stream, at its beginning."""
        return Session(self.model)

    def reset(self, session=None):
        """Forget what a session (or the default one) has seen."""
        (session or self.default_session).reset()

    def available(self, backend):
        """Whether a backend can run this model here."""
        compiled = jit.backend() == "numba" and fused_step.supports(self.model)
        return backend == "numpy" or backend == "numba" and compiled

    def _settled(self, backend):
        backend = ALIASES.get(backend, backend)
        require(backend in ("auto", *BACKENDS), f"backend={backend!r}; expected auto, {', '.join(BACKENDS)}")
        return next((b for b in BACKENDS if self.available(b)), "numpy") if backend == "auto" else backend

    def infer(self, obs, action, reward=0.0, backend=None, *, session=None, timestamp=None):
        """(y (output_dim), {"backend", "backend_available"}) of one step of a session.

        obs (obs_dim), action (action_dim): the one before; reward: the one before.  timestamp : seconds.
        The state changes only if the step succeeds.  ShapeError, DTypeError for NaN or what is no number, ConfigError
        for a clock that goes back.
        """
        session = session or self.default_session
        asked = self.backend if backend is None else self._settled(backend)
        used = asked if self.available(asked) else "numpy"
        obs = self._checked(obs, (self.model.obs_dim,) if self.model.config.obs_type == "vector" else None, "obs")
        action = self._checked(action, (self.model.action_dim,), "action")
        reward = self._checked(np.reshape(reward, -1), (1,), "reward")
        if timestamp is not None:
            if not np.isfinite(timestamp) or session.timestamp is not None and timestamp < session.timestamp:
                raise ConfigError(f"timestamp {timestamp!r} after {session.timestamp!r}: time does not go back; reset "
                                  "the session for a new episode")
        if used == "numba":
            if self._packed is None:
                self._packed = fused_step.pack(self.model, self.variables["params"])
            y = np.empty(self.model.output_dim, np.float32)
            fused_step.fused_step(*self._packed, obs, action, reward, *session.as_flat(), y)
        else:
            batch = (x[None] for x in (obs, action, reward))
            y, session.state, _ = self.model.step(self.variables["params"], *batch, session.as_state())
            y = y[0]
        session.steps += 1
        session.timestamp = timestamp if timestamp is not None else session.timestamp
        return y, {"backend": used, "backend_available": used == asked}

    @staticmethod
    def _checked(x, shape, name):
        try:
            x = np.ascontiguousarray(x, np.float32)
        except (TypeError, ValueError):
            raise DTypeError(f"{name} is {type(x).__name__}; expected numbers") from None
        if shape is not None and x.shape != shape:
            raise ShapeError(f"{name} has shape {x.shape}; expected {shape}")
        if not np.isfinite(x).all():
            raise DTypeError(f"{name} holds NaN or infinity; the step was not taken and the session is as it was")
        if np.abs(x).max(initial=0) > LARGEST:
            raise DTypeError(f"{name} holds {np.abs(x).max():g}; expected numbers up to {LARGEST:g}: give it scaled")
        return x

    def latency(self, steps=200, backend=None):
        """Milliseconds of a step on this machine: {"median_ms", "p95_ms", "backend"}, in a session of its own."""
        session, rng = self.session(), np.random.default_rng(0)
        shape = (32, 32, self.model.config.image_channels)
        obs = rng.standard_normal(self.model.obs_dim if self.model.config.obs_type == "vector" else shape)
        action, times, about = np.zeros(self.model.action_dim), [], {}
        for _ in range(steps + 20):
            begun = time.perf_counter()
            _, about = self.infer(obs, action, 1.0, backend, session=session)
            times.append(1e3 * (time.perf_counter() - begun))
        times = np.array(times[20:])
        return {"median_ms": float(np.median(times)), "p95_ms": float(np.quantile(times, 0.95)),
                "backend": about["backend"]}


# ---------------------------------------------------------------------- int8
def quantize_int8(params):
    """({name: int8 or float32 array}, {name: scales}): matrices at 8 bits, symmetric, a scale for each output.

    A weight comes back within half a scale of what it was.
    """
    small, scales = {}, {}
    for name, x in flatten(params).items():
        x = np.asarray(getattr(x, "data", x), np.float32)
        if x.ndim < 2 or not name.endswith("kernel"):
            small[name] = x
            continue
        axes = tuple(range(x.ndim - 1)) if x.ndim == 2 else tuple(range(1, x.ndim))  # convolutions: output first
        scale = np.abs(x).max(axis=axes, keepdims=True) / 127
        scale = np.where(scale == 0, 1, scale).astype(np.float32)
        small[name], scales[name] = np.rint(x / scale).astype(np.int8), scale
    return small, scales


def dequantize_int8(small, scales):
    """The tree of float32 arrays that :func:`quantize_int8` stands for."""
    return unflatten({name: x * scales[name] if name in scales else x for name, x in small.items()})


def int8_error(model, params, *, steps=64, seed=0):
    """What int8 costs: {"max_weight_error", "weight_error_bound", "max_output_error"}.

    The output error is the largest over ``steps`` steps of one random stream with its memory.
    """
    exact = map_leaves(lambda x: np.asarray(getattr(x, "data", x), np.float32), params)
    small, scales = quantize_int8(exact)
    rounded = dequantize_int8(small, scales)
    one, two = flatten(exact), flatten(rounded)
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((1, steps, model.obs_dim), np.float32)
    actions = rng.uniform(-1, 1, (1, steps, model.action_dim)).astype(np.float32)
    rewards = rng.integers(0, 2, (1, steps, 1)).astype(np.float32)
    outputs = [model.sequence({"params": tree}, obs, actions, rewards)[0] for tree in (exact, rounded)]
    return {
        "max_weight_error": max(float(np.abs(one[name] - two[name]).max()) for name in one),
        "weight_error_bound": max(float(scale.max()) / 2 for scale in scales.values()) * (1 + 1e-5),
        "max_output_error": float(np.abs(outputs[0] - outputs[1]).max()),
    }
