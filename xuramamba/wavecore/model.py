"""The whole WaveCore model: encoder → memory read → core → decoder, and what the step writes.

    model, variables = make_core_model(42, obs_dim=64, action_dim=7, output_dim=7, config=CoreModelConfig.seed())
    y, info = model.apply(variables, x_obs, a_prev, r_t, s_prev, w_prev, p_prev, cms_memories, cms_keys)

The model is a function: parameters and states go in, output and new states come out.
"""

from typing import NamedTuple

import numpy as np

from xuracore import ops
from xuracore.autograd import gradients
from xuracore.config import require
from xuracore.errors import ConfigError, ShapeError
from xuracore.tensor import Tensor
from xuramamba.wavecore import batch_utils, encoder
from xuramamba.wavecore.config import CoreModelConfig
from xuramamba.wavecore.core import core_step, new_core
from xuramamba.wavecore.memory import check_memory, cms_read, cms_write, empty_memory, new_read, new_write
from xuramamba.wavecore.parameters import arrays, count, flatten, map_leaves

ABLATIONS = ("cms", "wave", "particle")


class CoreState(NamedTuple):
    """Everything that a model carries from step to step; lists have one entry a level."""

    s: object  # (B, d_s)
    w: object  # (B, d_w)
    p: object  # (B, d_p)
    memories: list  # [(B, N, d)]
    keys: list  # [(B, N, d_k)]
    usage: list  # [(B, N)] plain arrays

    def detach(self):
        """The same numbers off the tape: where truncated backpropagation stops."""
        return CoreState(*(_detach(part) for part in self))

    def reset(self, ended):
        """The state with every row where ``ended`` (B) is true set to zero: a new episode begins there."""
        if not np.any(ended):
            return self
        kept = 1 - np.asarray(ended, np.float32)

        def clear(x):
            return x * kept.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))

        return CoreState(*([clear(x) for x in part] if isinstance(part, list) else clear(part) for part in self))


def _detach(x):
    if isinstance(x, list):
        return [_detach(item) for item in x]
    return x.data if isinstance(x, Tensor) else x


class Step(NamedTuple):
    """What one step shows beside its output and its state."""

    encoded: object  # e (B, d_e)
    query: object  # (B, d_k)
    context: object  # (B, d_c)
    attentions: list  # [(B, N)]
    shown: object  # (B, d_s), what decoder and heads see of the core


class CoreModel:
    """A WaveCore model of given sizes.  It holds no numbers: see :func:`make_core_model`.

    obs_dim : numbers of an observation; of an image, the channels are the configuration's.
    """

    def __init__(self, config, obs_dim, action_dim, output_dim):
        sizes = {"obs_dim": obs_dim, "action_dim": action_dim, "output_dim": output_dim}
        require(isinstance(config, CoreModelConfig), f"config is a {type(config).__name__}; expected CoreModelConfig")
        for name, size in sizes.items():
            require(type(size) is int and size > 0, f"{name}={size!r}; expected a positive whole number")
        self.config, self.obs_dim, self.action_dim, self.output_dim = config, obs_dim, action_dim, output_dim

    def init(self, rng, object_features=False):
        """A new tree of Parameters.  rng : a Generator or a whole number.

        object_features : make weights for them too (the configuration must have use_object_slot).
        """
        rng, c = np.random.default_rng(rng), self.config
        require(not object_features or c.use_object_slot, "object features need use_object_slot=True")
        tree = {"encoder": encoder.new_encoder(rng, c, self.obs_dim, self.action_dim), "cms": new_read(rng, c),
                "core": new_core(rng, c), "decoder": encoder.new_decoder(rng, c, self.output_dim)}
        for name, part in (("write", new_write(rng, c)),
                           ("heads", encoder.new_heads(rng, c, self.obs_dim, self.action_dim))):
            if part:
                tree[name] = part
        if object_features:
            tree["encoder"]["objects"] = encoder.new_objects(rng, c)
        return tree

    def param_count(self, variables):
        """How many numbers there are to learn."""
        return count(_params(variables))

    def initial_state(self, batch, dtype=np.float32):
        """The state before the first step: all zeros, memory empty."""
        c = self.config
        return CoreState(*(np.zeros((batch, d), dtype) for d in (c.d_s, c.d_w, c.d_p)), *empty_memory(c, batch, dtype))

    def step(self, params, obs, action, reward, state, objects=None, ablate=()):
        """(y (B, output_dim), new CoreState, Step) for inputs with a batch axis, already of one dtype.

        ablate : parts to silence, of "cms", "wave" and "particle".
        """
        c = self.config
        e = encoder.encode(params["encoder"], c, obs, action, reward, objects)
        query, context, attentions = cms_read(params["cms"], c, state.s, e, state.memories, state.keys)
        if "cms" in ablate:
            context = context * 0
        shown, s, w, p = core_step(params["core"], c, state.s, state.w, state.p, e, context, ablate)
        y = encoder.decode(params["decoder"], c, shown, context)
        memories, keys, usage = state.memories, state.keys, state.usage
        if "cms" not in ablate:
            memories, keys, usage = cms_write(params.get("write"), params["cms"], c, state.s, e, reward, query,
                                              memories, keys, usage, attentions)
        return y, CoreState(s, w, p, memories, keys, usage), Step(e, query, context, attentions, shown)

    def sequence(self, variables, obs, actions, rewards, state=None, resets=None, ablate=()):
        """(outputs (B, T, output_dim), last CoreState) of T steps; the same numbers as T calls of one step.

        obs (B, T, obs_dim), actions (B, T, action_dim), rewards (B, T, 1).  resets (B, T): true where an
        episode begins, so that the state before that step is zero.
        """
        params = _params(variables)
        dtype = _dtype(params)
        obs, actions, rewards = (np.asarray(x, dtype) for x in (obs, actions, rewards))
        state = self.initial_state(len(obs), dtype) if state is None else state
        outputs = []
        for t in range(obs.shape[1]):
            if resets is not None:
                state = state.reset(resets[:, t])
            y, state, _ = self.step(params, obs[:, t], actions[:, t], rewards[:, t], state, ablate=ablate)
            outputs.append(y)
        return ops.stack(*outputs, axis=1), state

    def apply(self, variables, x_obs, a_prev, r_t, s_prev, w_prev, p_prev, cms_memories, cms_keys,
              object_features=None, audio_features=None, *, cms_usage=None):  # fmt: skip
        """(y, info) of one step.

        x_obs (B, obs_dim), or images (B, H, W, C); a_prev (B, action_dim); r_t (B, 1); s_prev (B, d_s);
        w_prev (B, d_w); p_prev (B, d_p); cms_memories [(B, N, d)] and cms_keys [(B, N, d_k)] by level.
        All may lack the batch axis together; results then lack it too.
        cms_usage : [(B, N)], how much each slot was used; without it the norms of the slots serve.
        info : query, context, attention_weights, fast_state, wave_state, particle_state, cms_memories, cms_keys;
            with cms_usage also that; with heads value and world_model.
        Raises ShapeError and BatchDimensionError for shapes, ConfigError for audio, which has no encoder here.
        """
        if audio_features is not None:
            raise ConfigError("audio_features were given, but WaveCore has no audio encoder; leave them out")
        params, c = _params(variables), self.config
        given, single = batch_utils.normalize_inputs(
            x_obs, a_prev, r_t, s_prev, w_prev, p_prev, cms_memories, cms_keys, object_features,
            3 if c.obs_type == "image" else 1)
        dtype = _dtype(params)
        given = [[_as(x, dtype) for x in part] if isinstance(part, list) else _as(part, dtype) for part in given]
        obs, action, reward, s, w, p, memories, keys, objects = given
        batch = obs.shape[0]
        self._check(obs, action, s, w, p)
        check_memory(c, batch, memories, keys)
        if cms_usage is not None:
            cms_usage = [batch_utils.ensure_batch_dim(x)[0] for x in cms_usage]
        y, state, seen = self.step(params, obs, action, reward, CoreState(s, w, p, memories, keys, cms_usage), objects)
        info = {
            "query": seen.query, "context": seen.context, "attention_weights": list(seen.attentions),
            "fast_state": state.s, "wave_state": state.w, "particle_state": state.p,
            "cms_memories": list(state.memories), "cms_keys": list(state.keys),
        }  # fmt: skip
        if cms_usage is not None:
            info["cms_usage"] = list(state.usage)
        if c.value_head:
            info["value"] = encoder.value_of(params["heads"], seen.shown, seen.context)
        if c.world_model_head:
            foreseen = encoder.foresee(params["heads"], seen.shown, seen.context, action)
            info["world_model"] = dict(zip(("next_observation", "reward", "done_logit"), foreseen))
        return batch_utils.denormalize_outputs(y, single), batch_utils.denormalize_outputs(info, single)

    forward_batch = apply

    def forward_single(self, variables, x_obs, *inputs, **options):
        """:meth:`apply` for inputs without a batch axis; BatchDimensionError if they have one."""
        axes = 3 if self.config.obs_type == "image" else 1
        if np.ndim(x_obs) != axes:
            raise batch_utils.BatchDimensionError(f"forward_single: x_obs has shape {np.shape(x_obs)}; "
                                                  f"expected {axes} axes, without a batch")
        return self.apply(variables, x_obs, *inputs, **options)

    def loss_and_grad(self, params, batch):
        """(mean squared error, tree of gradients) of one step; batch is (inputs of apply, target (B, output_dim))."""
        inputs, target = batch
        y, _ = self.apply({"params": params}, *inputs)
        loss = ops.mse_loss(y, np.asarray(target, y.dtype))
        flat = flatten(params)
        found = iter(gradients(loss, list(flat.values())))
        return float(loss.data), map_leaves(lambda _: next(found), params)

    def _check(self, obs, action, s, w, p):
        c = self.config
        expected = {"a_prev": (action, self.action_dim), "s_prev": (s, c.d_s), "w_prev": (w, c.d_w),
                    "p_prev": (p, c.d_p), "x_obs": (obs, c.image_channels if c.obs_type == "image" else self.obs_dim)}
        for name, (x, width) in expected.items():
            if x.shape[-1] != width:
                raise ShapeError(f"{name} has shape {x.shape}; expected {width} as the last size")


def _params(variables):
    if not isinstance(variables, dict):
        raise ConfigError(f"variables is a {type(variables).__name__}; expected {{'params': …}}")
    return variables["params"] if "params" in variables else variables


def _dtype(params):
    return params["decoder"]["last"]["kernel"].dtype


def _as(x, dtype):
    if x is None or isinstance(x, Tensor):
        return x
    return np.asarray(x, dtype)


def make_core_model(rng_key, obs_dim, action_dim, output_dim, config=None):
    """(model, {"params": tree of Parameters}).

    rng_key : a whole number or a numpy Generator.   config : default ``CoreModelConfig.pi5_optimized()``.
    """
    model = CoreModel(config or CoreModelConfig.pi5_optimized(), obs_dim, action_dim, output_dim)
    return model, {"params": model.init(rng_key)}


def inference_variables(variables, dtype=None):
    """The same variables as plain arrays: nothing is recorded, and each step is faster."""
    return {"params": arrays(_params(variables), dtype)}
