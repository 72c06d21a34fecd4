"""Inputs with or without a batch axis, brought to one form and back."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.tensor import Tensor


class BatchDimensionError(ShapeError):
    """Inputs of one call disagree about the batch, or have the wrong number of axes."""


def ensure_batch_dim(x, axes=1):
    """(x with a batch axis, whether it had none).  ``axes`` is how many a single example has."""
    x = x if isinstance(x, Tensor) else np.asarray(x)
    if x.ndim == axes:
        return x[None] if isinstance(x, np.ndarray) else x.reshape((1, *x.shape)), True
    if x.ndim == axes + 1:
        return x, False
    raise BatchDimensionError(f"shape {x.shape}; expected {axes} axes, or {axes + 1} with a batch")


def ensure_batch_dim_reward(reward, batch=None):
    """The reward as (B, 1): a number, (1), (B) or (B, 1) given."""
    reward = reward if isinstance(reward, Tensor) else np.asarray(reward)
    if reward.ndim <= 1:
        reward = reward.reshape((-1, 1))
    if reward.ndim != 2 or reward.shape[1] != 1 or batch is not None and reward.shape[0] != batch:
        expected = "(B, 1)" if batch is None else f"({batch}, 1)"
        raise BatchDimensionError(f"reward has shape {reward.shape}; expected {expected}")
    return reward


def validate_batch_consistency(**inputs):
    """The batch that all inputs share; BatchDimensionError names those that differ."""
    sizes = {name: x.shape[0] for name, x in inputs.items() if x is not None}
    if len(set(sizes.values())) > 1:
        raise BatchDimensionError(f"inputs have different batches: {sizes}")
    return next(iter(sizes.values()))


def normalize_inputs(x_obs, a_prev, r_t, s_prev, w_prev, p_prev, cms_memories, cms_keys, object_features=None,
                     obs_axes=1):
    """(the inputs, all with a batch axis, whether a batch was added).  BatchDimensionError if they disagree."""
    x_obs, single = ensure_batch_dim(x_obs, obs_axes)
    named = {"a_prev": a_prev, "s_prev": s_prev, "w_prev": w_prev, "p_prev": p_prev}
    pairs = {name: ensure_batch_dim(x) for name, x in named.items()}
    memories, keys = ([ensure_batch_dim(x, 2) for x in xs] for xs in (cms_memories, cms_keys))
    objects = None if object_features is None else ensure_batch_dim(object_features, 2)
    added = [single, *(p[1] for p in pairs.values()), *(p[1] for p in (*memories, *keys))]
    added += [objects[1]] if objects else []
    if len(set(added)) > 1:
        raise BatchDimensionError("some inputs have a batch axis and some have none; give all of them the same way")
    arrays = {name: p[0] for name, p in pairs.items()}
    batch = validate_batch_consistency(
        x_obs=x_obs, **arrays, object_features=objects[0] if objects else None,
        **{f"cms_memories[{i}]": p[0] for i, p in enumerate(memories)},
        **{f"cms_keys[{i}]": p[0] for i, p in enumerate(keys)},
    )  # fmt: skip
    reward = ensure_batch_dim_reward(r_t, batch)
    return (x_obs, arrays["a_prev"], reward, arrays["s_prev"], arrays["w_prev"], arrays["p_prev"],
            [p[0] for p in memories], [p[0] for p in keys], objects[0] if objects else None), single


def denormalize_outputs(value, single):
    """``value`` (an array, or lists and dicts of them) without the batch axis that was added."""
    if not single or value is None:
        return value
    if isinstance(value, dict):
        return {name: denormalize_outputs(x, single) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [denormalize_outputs(x, single) for x in value]
    return value[0]
