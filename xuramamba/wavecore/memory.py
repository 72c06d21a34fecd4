"""The hierarchical memory (CMS): slots with unit keys, read by content, written where the gate opens.

Read, of each level: α = softmax(K q / √d_k) over the slots in use, context αᵀM.  A slot is in use when its key
is not zero; a memory without any gives zeros.  Keys have length 1 and do not fade, so that the length of q
is what makes a read sharp.

Write, of each level with its decay d: all slots fade, M ← (1 - d) M, and one slot j takes in the new value and
key, M_j ← (1 - g) M_j + g v and K_j ← unit((1 - g) K_j + g k).  The slot is the one whose key is near k, or else
the least used.  The choice has no gradient; value, key and gate have one.  A gate below the threshold
writes nothing, but is told by its gradient what writing would have done.
As 0 ≤ g ≤ 1, no slot grows beyond max(‖M_0‖, max ‖v‖).
"""

import math

import numpy as np

import xuracore as xc
from xuracore import ops
from xuracore.errors import ShapeError
from xuracore.tensor import Tensor
from xuramamba.wavecore.parameters import dense, mlp, new_dense, new_mlp

QUERY_GAIN = 8.0  # of the initial weights: with unit keys, a query of length one would read the mean of all slots
STATE_SHARE = 0.1  # of the initial weights: at first a query is about what is seen, not about when
RELU_MEAN = 1 / math.sqrt(2 * math.pi)  # of a ReLU behind a norm: taken off, lest all keys share one direction


def in_use(keys):
    """Which slots hold something, (B, N): those whose key (B, N, d_k) is not zero."""
    return np.einsum("bnk,bnk->bn", keys, keys) > 0


class SlotRead(xc.Function):
    """(context (B, d), attention (B, N)) for query (B, d_k), keys (B, N, d_k), memory (B, N, d).

    null_slot : one more slot, of zeros and with logit 0, takes part.
    """

    outputs = 2

    def forward(save, query, keys, memory, *, null_slot=False):
        scale = query.dtype.type(1 / math.sqrt(query.shape[-1]))
        logits = np.where(in_use(keys), (keys @ query[:, :, None])[..., 0] * scale, -np.inf)
        top = logits.max(axis=1, keepdims=True, initial=0 if null_slot else -np.inf)
        top = np.where(np.isneginf(top), 0, top).astype(query.dtype)
        attention = np.exp(logits - top)
        total = attention.sum(axis=1, keepdims=True)
        if null_slot:
            total += np.exp(-top)
        attention /= np.where(total == 0, 1, total)  # nothing in use: read nothing
        save(query, keys, memory, attention, scale)
        return (attention[:, None] @ memory)[:, 0], attention

    def vjp(grad, saved, needs):
        query, keys, memory, attention, scale = saved
        to_context, to_attention = grad
        to_weights = (memory @ to_context[:, :, None])[..., 0] + to_attention
        mean = (attention * to_weights).sum(axis=1, keepdims=True)
        to_logits = attention * (to_weights - mean) * scale
        return (
            (to_logits[:, None] @ keys)[:, 0],
            to_logits[:, :, None] * query[:, None] if needs[1] else None,
            attention[:, :, None] * to_context[:, None] if needs[2] else None,
        )


class SlotWrite(xc.Function):
    """(memory, keys) after one write of value (B, d) and key (B, d_k), with gate (B, 1), to ``slot`` (B).

    decay : share of every slot that fades.   threshold : gates below it write nothing.
    """

    outputs = 2

    def forward(save, memory, keys, value, key, gate, *, slot, decay, threshold=0.0):
        rows = np.arange(len(memory))
        opened = np.where(gate >= threshold, gate, 0).astype(gate.dtype)
        retain = memory.dtype.type(1 - decay)
        memory, keys = memory * retain, keys.copy()
        old, old_key = memory[rows, slot], keys[rows, slot]
        memory[rows, slot] = old + opened * (value - old)
        mixed = old_key + opened * (key - old_key)
        length = np.sqrt((mixed * mixed).sum(axis=1, keepdims=True))
        safe = np.where(length == 0, 1, length)
        unit = keys[rows, slot] = np.where(opened > 0, mixed / safe, old_key)
        save(rows, slot, opened, value - old, key - old_key, unit, safe, retain)
        return memory, keys

    def vjp(grad, saved, needs):
        rows, slot, opened, change, key_change, unit, length, retain = saved
        to_memory, to_keys = grad
        row, to_unit = to_memory[rows, slot], to_keys[rows, slot]
        to_mixed = (to_unit - unit * (unit * to_unit).sum(axis=1, keepdims=True)) / length
        to_mixed = np.where(opened > 0, to_mixed, to_unit)
        to_gate = ((row * change).sum(axis=1, keepdims=True)
                   + np.where(opened > 0, (to_mixed * key_change).sum(axis=1, keepdims=True), 0))
        back, back_keys = to_memory * retain, to_keys.copy()
        back[rows, slot] = retain * (1 - opened) * row
        back_keys[rows, slot] = np.where(opened > 0, (1 - opened) * to_mixed, to_unit)
        return back, back_keys, opened * row, opened * to_mixed, to_gate.astype(row.dtype)


def choose_slot(keys, key, usage, merge_similarity):
    """The slot (B) to write: the one in use whose key is nearest if its cosine exceeds the threshold, else the
    least used.  keys (B, N, d_k), key (B, d_k), usage (B, N); plain arrays.
    """
    similar = np.where(in_use(keys), (keys @ key[:, :, None])[..., 0], -np.inf)
    nearest = similar.argmax(axis=1)
    close = similar[np.arange(len(keys)), nearest] > merge_similarity
    return np.where(close, nearest, usage.argmin(axis=1))


def new_read(rng, c):
    """Parameters of :func:`cms_read`."""
    query = new_mlp(rng, c.d_s + c.d_e, c.d_s + c.d_e, c.d_k, c.use_layer_norm)
    query["in"]["kernel"].data[: c.d_s] *= np.float32(STATE_SHARE)
    kernel = query["out"]["kernel"].data
    kernel *= np.float32(QUERY_GAIN)
    query["out"]["bias"].data -= np.float32(RELU_MEAN) * kernel.sum(axis=0)
    return {
        "query": query,
        "levels": {str(i): new_dense(rng, width, c.d_c, bias=False) for i, width in enumerate(c.cms_dims)},
        "mix": new_dense(rng, c.num_levels * c.d_c, c.num_levels),
    }


def new_write(rng, c):
    """Parameters of :func:`cms_write`; none unless config.cms_write is "network"."""
    if c.cms_write != "network":
        return {}
    width = c.d_s + c.d_e
    return {
        str(i): {"gate": new_dense(rng, width + 1, 1), "value": new_dense(rng, width, d),
                 "key": new_dense(rng, width, c.d_k)}
        for i, d in enumerate(c.cms_dims)
    }


def cms_read(params, config, s, e, memories, keys):
    """(query (B, d_k), context (B, d_c), attention of each level [(B, N)]).

    q = W(ReLU(norm(W [s; e]))); each level's context is brought to width d_c and they are mixed with
    β = softmax(W [u¹; …; u^L]).
    """
    query = mlp(params["query"], ops.concatenate(s, e, axis=-1))
    seen, attentions = [], []
    for i, (memory, key) in enumerate(zip(memories, keys)):
        context, attention = SlotRead.apply(query, key, memory, null_slot=config.cms_null_slot)
        seen.append(dense(params["levels"][str(i)], context))
        attentions.append(attention)
    mix = ops.softmax(dense(params["mix"], ops.concatenate(*seen, axis=-1)), axis=-1)
    context = sum((mix[:, i : i + 1] * u for i, u in enumerate(seen[1:], 1)), mix[:, :1] * seen[0])
    return query, context, attentions


def cms_write(params, read_params, config, s, e, r, query, memories, keys, usage, attentions):
    """(memories, keys, usage) after the step's write; s (B, d_s), e (B, d_e), r (B, 1), query (B, d_k).

    usage : [(B, N)] plain arrays, how much each slot was read and written of late; None takes the
        norms of the slots for it.
    """
    if config.cms_write == "none":
        return memories, keys, usage
    both = ops.concatenate(s, e, axis=-1)
    seen = ops.concatenate(both, r, axis=-1) if config.cms_write == "network" else None
    written, new_keys, new_usage = [], [], []
    for i, (memory, key_rows) in enumerate(zip(memories, keys)):
        if config.cms_write == "tied":
            salience, key = r, query
            value = ops.matmul(e, ops.transpose(read_params["levels"][str(i)]["kernel"]))
        else:
            own = params[str(i)]
            salience, key, value = dense(own["gate"], seen), dense(own["key"], both), dense(own["value"], both)
        key = ops.l2_normalize(key)
        gate = ops.sigmoid((salience - config.cms_salience_threshold) * (1 / config.cms_salience_temperature))
        stored = np.asarray(_plain(memory))
        used = np.linalg.norm(stored, axis=-1) if usage is None else usage[i]
        slot = choose_slot(_plain(key_rows), _plain(key), used, config.cms_merge_similarity)
        options = {"slot": slot, "decay": config.cms_decays[i], "threshold": config.cms_write_threshold}
        memory, key_rows = SlotWrite.apply(memory, key_rows, value, key, gate, **options)
        written.append(memory)
        new_keys.append(key_rows)
        if usage is not None:
            after = used * used.dtype.type(1 - config.cms_usage_decay) + _plain(attentions[i])
            opened = _plain(gate)[:, 0]
            after[np.arange(len(slot)), slot] += np.where(opened >= config.cms_write_threshold, opened, 0)
            new_usage.append(after)
    return written, new_keys, new_usage if usage is not None else None


def _plain(x):
    return x.data if isinstance(x, Tensor) else x


def empty_memory(config, batch, dtype=np.float32):
    """(memories, keys, usage) of nothing yet: lists over levels of (B, N, d), (B, N, d_k), (B, N)."""
    pairs = list(zip(config.cms_sizes, config.cms_dims))
    return (
        [np.zeros((batch, n, d), dtype) for n, d in pairs],
        [np.zeros((batch, n, config.d_k), dtype) for n, _ in pairs],
        [np.zeros((batch, n), dtype) for n, _ in pairs],
    )


def check_memory(config, batch, memories, keys):
    """ShapeError unless there is a memory and a table of keys for each level, of the sizes of the config."""
    for what, given, widths in (("cms_memories", memories, config.cms_dims),
                                ("cms_keys", keys, (config.d_k,) * config.num_levels)):
        shapes = [tuple(x.shape) for x in given]
        expected = [(batch, n, d) for n, d in zip(config.cms_sizes, widths)]
        if shapes != expected:
            raise ShapeError(f"{what} has shapes {shapes}; expected {expected}")
