"""Token by token with a state of constant size: each new token costs the same, however long the past."""

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuramamba.sampling import choose


def generate(
    model, token_ids, max_new_tokens=64, temperature=0.0, top_k=None, top_p=None, rng=None, stop=None,
    stream=None,
):  # fmt: skip
    """Continue each row of ``token_ids`` (B, L) and return (B, L + new) int64.

    stop : a token id, or a collection of them, after which a row repeats its stop token; generation
        ends when all rows have stopped, or after ``max_new_tokens``.
    stream : called with the new ids (B,) after each step; returning True ends generation.
    Raises ShapeError, ConfigError.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ShapeError(f"token_ids has shape {ids.shape}; expected (B, L) with L at least 1")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens}; expected 0 or more")
    ends = [] if stop is None else list(stop) if np.iterable(stop) else [stop]
    stopped = np.zeros(len(ids), bool)
    pieces, fed, state = [ids], ids, None
    for _ in range(max_new_tokens):
        hidden, state = model.backbone(fed, state)
        logits = model.logits(hidden[:, -1])
        new = choose(logits.numpy(), temperature, top_k, top_p, rng)
        new = np.where(stopped, pieces[-1][:, -1], new)
        pieces.append(new[:, None])
        stopped |= np.isin(new, ends)
        if (stream is not None and stream(new)) or stopped.all():
            break
        fed = new[:, None]
    return np.concatenate(pieces, axis=1)
