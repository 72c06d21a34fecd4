"""One step of the gated model for one stream, as one kernel: what a robot's loop runs.

The weights lie in one vector, in the order of :func:`order`; sizes and options in two short vectors.
State, memory, keys and usage are changed in place.  Shapes: weights (P), sizes and options as :func:`pack`
makes them, obs (obs_dim), action (action_dim), reward (1), s (d_s), w (d_w), p (d_p); memory, keys and usage
of all levels one after the other, flat; y (output_dim).
"""

import math

import numpy as np

from xuracore.jit import REDUCE, device, kernel
from xuracore.kernels.fastmath import exp, sigmoid, softplus, tanh
from xuramamba.wavecore.parameters import NORM_EPS, flatten

WRITES = {"none": 0, "tied": 1, "network": 2}


def supports(model):
    """Whether the kernel computes this model: the gated core on vectors, with norms and wave, without heads."""
    c = model.config
    return (c.core == "gated" and c.obs_type == "vector" and c.use_layer_norm and c.use_mamba_wave
            and not c.value_head and not c.world_model_head)


def order(config):
    """Names of all parameters, in the order in which the kernel meets them."""
    blocks = ["encoder/obs/in", "encoder/obs/norm", "encoder/obs/out", "encoder/action", "encoder/reward",
              "encoder/fuse/in", "encoder/fuse/norm", "encoder/fuse/out", "encoder/norm",
              "cms/query/in", "cms/query/norm", "cms/query/out", *(f"cms/levels/{i}" for i in range(config.num_levels)),
              "cms/mix", "core/z", "core/gate", "core/particle/in", "core/particle/norm", "core/particle/out",
              "core/u_p", "core/wave/in", "core/wave/dt", "core/wave/b", "core/wave/k", "core/wave/gate",
              "core/wave/out",
              "core/wave", "core/u_w", "decoder/in", "decoder/norm", "decoder/out", "decoder/last"]
    if config.cms_write == "network":
        blocks += [f"write/{i}/{part}" for i in range(config.num_levels) for part in ("gate", "value", "key")]
    names = []
    for block in blocks:
        if block == "core/wave":
            names += [f"core/wave/{name}" for name in ("a_raw", "b_base", "c_base", "d")]
        elif block.startswith(("cms/levels", "core/u_")):
            names.append(f"{block}/kernel")
        else:
            names += [f"{block}/{name}" for name in (("scale", "bias") if "norm" in block else ("kernel", "bias"))]
    return names


def pack(model, params, dtype=np.float32):
    """(weights, sizes, options): what the kernel needs of a model."""
    c, flat = model.config, flatten(params)
    weights = np.concatenate([np.asarray(flat[name], dtype).ravel() for name in order(c)])
    sizes = [model.obs_dim, model.action_dim, model.output_dim, c.d_s, c.d_w, c.d_p, c.d_e, c.d_k, c.d_c, c.num_levels,
             c.mamba_state_dim, c.use_object_slot, WRITES[c.cms_write], c.saturation == "soft", c.wave_mode == "euler",
             c.cms_null_slot, c.particle_input, c.output_type == "continuous", *c.cms_sizes, *c.cms_dims]
    options = [c.mamba_dt_scale, c.mamba_dt_min, c.state_saturation_limit, c.cms_salience_threshold,
               c.cms_salience_temperature, c.cms_write_threshold, c.cms_merge_similarity, c.cms_usage_decay,
               NORM_EPS, *c.cms_decays]
    return weights, np.array(sizes, np.int64), np.array(options, dtype)


# ---------------------------------------------------------------------- the readable form
class _Reader:
    def __init__(self, weights):
        self.weights, self.at = weights, 0

    def take(self, *shape):
        size = math.prod(shape)
        self.at += size
        return self.weights[self.at - size : self.at].reshape(shape)

    def affine(self, x, outputs):
        return x @ self.take(len(x), outputs) + self.take(outputs)

    def norm(self, x, eps):
        x = (x - x.mean()) / np.sqrt(x.var() + eps)
        return x * self.take(len(x)) + self.take(len(x))

    def mlp(self, x, hidden, outputs, eps):
        return self.affine(np.maximum(self.norm(self.affine(x, hidden), eps), 0), outputs)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def fused_step_numpy(weights, sizes, options, obs, action, reward, s, w, p, memory, keys, usage, y):
    """NumPy twin of :func:`fused_step`."""
    outputs, d_s, d_w, d_p, d_e, d_k, d_c, levels, modes, slot, write, soft, euler, null, sees, tanh_out = sizes[2:18]
    dt_scale, dt_min, limit, theta, tau, threshold, merge, usage_decay, eps = options[:9]
    counts, widths, decays = sizes[18 : 18 + levels], sizes[18 + levels : 18 + 2 * levels], options[9:]
    read = _Reader(weights)

    def saturated(x):
        return limit * np.tanh(x / limit) if soft else np.clip(x, -limit, limit)

    parts = [read.mlp(obs, 2 * d_e, d_e, eps)]
    parts.append(np.maximum(read.affine(action, d_e // 2), 0))
    parts.append(np.maximum(read.affine(reward, d_e // 4), 0))
    parts += [np.zeros(d_e, s.dtype)] * bool(slot)
    e = read.norm(read.mlp(np.concatenate(parts), 2 * d_e, d_e, eps), eps)
    both = np.concatenate([s, e])
    query = read.mlp(both, d_s + d_e, d_k, eps)
    tables, seen, attentions, projections = [], [], [], []
    m = k = u = 0
    for n, d in zip(counts, widths):
        tables.append((memory[m : m + n * d].reshape(n, d), keys[k : k + n * d_k].reshape(n, d_k), usage[u : u + n]))
        m, k, u = m + n * d, k + n * d_k, u + n
        values, own, _ = tables[-1]
        used = (own * own).sum(1) > 0
        logits = np.where(used, own @ query / np.sqrt(s.dtype.type(d_k)), -np.inf)
        top = max(logits.max(), 0 if null else -np.inf)
        attention = np.exp(logits - top) if np.isfinite(top) else np.zeros(n, s.dtype)
        total = attention.sum() + (np.exp(-top) if null else 0)
        attentions.append(attention / (total if total else 1))
        projections.append(read.take(d, d_c))
        seen.append(attentions[-1] @ values @ projections[-1])
    mix = read.affine(np.concatenate(seen), levels)
    mix = np.exp(mix - mix.max())
    c = sum(b * x for b, x in zip(mix / mix.sum(), seen))
    z = read.affine(e, d_p)
    gate = _sigmoid(read.affine(np.concatenate([both, c]), d_s))
    p[:] = saturated(p + read.mlp(np.concatenate([p, z, c] if sees else [p, c]), d_p + d_c, d_p, eps))
    s_new = s + gate * (p @ read.take(d_p, d_s))
    x, size = np.concatenate([z, c]), d_w // modes
    entered = read.affine(x, size)
    step = np.logaddexp(0, read.affine(entered, size)) * dt_scale + dt_min
    b, out = read.affine(entered, size), read.affine(entered, size)
    wave_gate = _sigmoid(read.affine(x, size))
    to_emit, emit_bias = read.take(size, d_w), read.take(d_w)
    a = -np.logaddexp(0, read.take(size, modes))
    b_base, c_base, skip = read.take(size, modes), read.take(size, modes), read.take(size)
    exponent = step[:, None] * a
    safe = np.minimum(exponent, s.dtype.type(-1e-20))
    hold = step[:, None] * (1 if euler else np.expm1(safe) / safe)
    carry = np.exp(exponent) * w.reshape(size, modes) + hold * (b * entered)[:, None] * b_base
    emitted = ((carry * c_base).sum(1) * out + skip * entered) * wave_gate
    w[:] = saturated(carry.ravel())
    s_new = s_new + (1 - gate) * ((emitted @ to_emit + emit_bias) @ read.take(d_w, d_s))
    s[:] = saturated(s_new)
    hidden = d_s + d_c
    out = read.mlp(np.concatenate([s, c]), hidden, hidden // 2, eps)
    out = read.affine(np.maximum(out, 0), outputs)
    y[:] = np.tanh(out) if tanh_out else out
    for level, (values, own, use) in enumerate(tables if write else ()):
        if write == 2:
            salience = read.affine(np.concatenate([both, reward]), 1)[0]
            value, key = read.affine(both, values.shape[1]), read.affine(both, d_k)
        else:
            salience, value, key = reward[0], projections[level] @ e, query
        key = key / np.sqrt((key * key).sum() + s.dtype.type(1e-12))
        opened = _sigmoid((salience - theta) / tau)
        near = np.where((own * own).sum(1) > 0, own @ key, -np.inf)
        j = near.argmax() if near.max() > merge else use.argmin()
        values *= 1 - decays[level]
        use[:] = use * (1 - usage_decay) + attentions[level]
        if opened >= threshold:
            values[j] += opened * (value - values[j])
            mixed = own[j] + opened * (key - own[j])
            own[j] = mixed / (np.sqrt((mixed * mixed).sum()) or 1)
            use[j] += opened


# ---------------------------------------------------------------------- the compiled form
@device
def _product(weights, at, x, outputs, y):
    """Add x K to y, K (len x, outputs) at ``at``; returns the place behind it.  Zeros, of which ReLU makes many, cost
    nothing."""
    for i in range(x.size):
        xi = x[i]
        if xi != 0:
            row = weights[at + i * outputs : at + (i + 1) * outputs]
            for j in range(outputs):
                y[j] += xi * row[j]
    return at + x.size * outputs


@device
def _affine(weights, at, x, outputs, y):
    bias = weights[at + x.size * outputs : at + x.size * outputs + outputs]
    for j in range(outputs):
        y[j] = bias[j]
    return _product(weights, at, x, outputs, y) + outputs


@device
def _norm(weights, at, size, eps, x, positive):
    """Normalise x in place, then take the positive part if asked; returns the place behind scale and bias."""
    mean = x.dtype.type(0)
    for i in range(size):
        mean += x[i]
    mean /= x.dtype.type(size)
    variance = x.dtype.type(0)
    for i in range(size):
        variance += (x[i] - mean) * (x[i] - mean)
    scale = x.dtype.type(1) / np.sqrt(variance / x.dtype.type(size) + eps)
    for i in range(size):
        value = (x[i] - mean) * scale * weights[at + i] + weights[at + size + i]
        x[i] = x.dtype.type(0) if positive and value < 0 else value
    return at + 2 * size


@device
def _mlp(weights, at, x, hidden, outputs, eps, between, y):
    at = _affine(weights, at, x, hidden, between)
    at = _norm(weights, at, hidden, eps, between, True)
    return _affine(weights, at, between[:hidden], outputs, y)


@device
def _saturated(x, limit, soft):
    if soft:
        return limit * tanh(x / limit)
    return min(max(x, -limit), limit)


@kernel(twin=fused_step_numpy, fastmath=REDUCE)
def fused_step(weights, sizes, options, obs, action, reward, s, w, p, memory, keys, usage, y):
    """One step in place; y is written, s, w, p, memory, keys and usage are changed.  See the module."""
    outputs, d_s, d_w, d_p, d_e, d_k, d_c = sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8]
    levels, modes, slot, write, soft = sizes[9], sizes[10], sizes[11], sizes[12], sizes[13] != 0
    euler, null, sees, tanh_out = sizes[14] != 0, sizes[15] != 0, sizes[16] != 0, sizes[17] != 0
    dt_scale, dt_min, limit, theta, tau = options[0], options[1], options[2], options[3], options[4]
    threshold, merge, usage_decay, eps = options[5], options[6], options[7], options[8]
    dtype, zero, one = s.dtype, s.dtype.type(0), s.dtype.type(1)
    widest = 4 * d_e + 2 * d_s + 2 * d_c + d_p + d_w
    between, fused = np.empty(widest, dtype), np.zeros(d_e + d_e // 2 + d_e // 4 + slot * d_e, dtype)
    both, e, query = np.empty(d_s + d_e + d_c + 1, dtype), np.empty(d_e, dtype), np.empty(d_k, dtype)
    # ------------------------------------------------------------------ encoder
    at = _mlp(weights, 0, obs, 2 * d_e, d_e, eps, between, fused)
    at = _affine(weights, at, action, d_e // 2, fused[d_e:])
    at = _affine(weights, at, reward, d_e // 4, fused[d_e + d_e // 2 :])
    for i in range(d_e, d_e + d_e // 2 + d_e // 4):
        fused[i] = zero if fused[i] < 0 else fused[i]
    at = _mlp(weights, at, fused, 2 * d_e, d_e, eps, between, e)
    at = _norm(weights, at, d_e, eps, e, False)
    for i in range(d_s):
        both[i] = s[i]
    for i in range(d_e):
        both[d_s + i] = e[i]
    at = _mlp(weights, at, both[: d_s + d_e], d_s + d_e, d_k, eps, between, query)
    # ------------------------------------------------------------------ read
    seen, attention = np.zeros(levels * d_c, dtype), np.empty(usage.size, dtype)
    projections = at
    m, k, u, scale = 0, 0, 0, one / np.sqrt(dtype.type(d_k))
    for level in range(levels):
        count, width = sizes[18 + level], sizes[18 + levels + level]
        top = zero if null else dtype.type(-np.inf)
        for n in range(count):
            row, dot, length = keys[k + n * d_k : k + (n + 1) * d_k], zero, zero
            for i in range(d_k):
                dot += row[i] * query[i]
                length += row[i] * row[i]
            attention[u + n] = dtype.type(-np.inf)
            if length != 0:
                attention[u + n] = dot * scale
                top = max(top, dot * scale)
        total, context = exp(-top) if null else zero, np.zeros(width, dtype)
        for n in range(count):
            weight = zero
            if attention[u + n] != -np.inf:
                weight = exp(attention[u + n] - top)
                total += weight
                row = memory[m + n * width : m + (n + 1) * width]
                for i in range(width):
                    context[i] += weight * row[i]
            attention[u + n] = weight
        if total != 0:
            for n in range(count):
                attention[u + n] /= total
            for i in range(width):
                context[i] /= total
        at = _product(weights, at, context, d_c, seen[level * d_c : (level + 1) * d_c])
        m, k, u = m + count * width, k + count * d_k, u + count
    at = _affine(weights, at, seen, levels, between)
    c = both[d_s + d_e : d_s + d_e + d_c]
    top, total = between[0], zero
    for i in range(1, levels):
        top = max(top, between[i])
    for i in range(levels):
        between[i] = exp(between[i] - top)
        total += between[i]
    for i in range(d_c):
        c[i] = zero
        for level in range(levels):
            c[i] += between[level] / total * seen[level * d_c + i]
    # ------------------------------------------------------------------ core
    x, gate, own = np.empty(d_p + d_c, dtype), np.empty(d_s, dtype), np.empty(2 * d_p + d_c, dtype)
    at = _affine(weights, at, e, d_p, x)
    for i in range(d_c):
        x[d_p + i] = c[i]
    at = _affine(weights, at, both[: d_s + d_e + d_c], d_s, gate)
    for i in range(d_s):
        gate[i] = sigmoid(gate[i])
    filled = d_p
    for i in range(d_p):
        own[i] = p[i]
    for i in range(0 if sees else d_p, d_p + d_c):
        own[filled] = x[i]
        filled += 1
    moved = np.empty(max(d_p, d_s, d_w), dtype)
    at = _mlp(weights, at, own[:filled], d_p + d_c, d_p, eps, between, moved)
    for i in range(d_p):
        p[i] = _saturated(p[i] + moved[i], limit, soft)
    for i in range(d_s):
        moved[i] = zero
    at = _product(weights, at, p, d_s, moved)
    for i in range(d_s):
        s[i] += gate[i] * moved[i]
    size = d_w // modes
    entered, step, b, out = np.empty(size, dtype), np.empty(size, dtype), np.empty(size, dtype), np.empty(size, dtype)
    at = _affine(weights, at, x, size, entered)
    at = _affine(weights, at, entered, size, step)
    at = _affine(weights, at, entered, size, b)
    at = _affine(weights, at, entered, size, out)
    at = _affine(weights, at, x, size, between)
    to_emit = at
    at += size * d_w + d_w
    for i in range(size):
        dt = softplus(step[i]) * dt_scale + dt_min
        total = zero
        for n in range(modes):
            place = i * modes + n
            a = -softplus(weights[at + place])
            decay = exp(dt * a)
            hold = dt
            if not euler:
                z = dt * a
                near = one + z * (dtype.type(0.5) + z * (dtype.type(1 / 6) + z * dtype.type(1 / 24)))
                hold = dt * near if z > dtype.type(-0.005) else (decay - one) / a
            carry = decay * w[place] + hold * b[i] * entered[i] * weights[at + d_w + place]
            total += carry * weights[at + 2 * d_w + place]
            w[place] = _saturated(carry, limit, soft)
        entered[i] = (total * out[i] + weights[at + 3 * d_w + i] * entered[i]) * sigmoid(between[i])
    at += 3 * d_w + size
    _affine(weights, to_emit, entered, d_w, between)
    for i in range(d_s):
        moved[i] = zero
    at = _product(weights, at, between[:d_w], d_s, moved)
    for i in range(d_s):
        s[i] = _saturated(s[i] + (one - gate[i]) * moved[i], limit, soft)
    # ------------------------------------------------------------------ decoder
    hidden = d_s + d_c
    shown, last = np.empty(hidden, dtype), np.empty(hidden // 2, dtype)
    for i in range(d_s):
        shown[i] = s[i]
    for i in range(d_c):
        shown[d_s + i] = c[i]
    at = _mlp(weights, at, shown, hidden, hidden // 2, eps, between, last)
    for i in range(hidden // 2):
        last[i] = zero if last[i] < 0 else last[i]
    at = _affine(weights, at, last, outputs, y)
    if tanh_out:
        for i in range(outputs):
            y[i] = tanh(y[i])
    # ------------------------------------------------------------------ write
    m, k, u = 0, 0, 0
    both[d_s + d_e] = reward[0]
    for level in range(levels if write else 0):
        count, width = sizes[18 + level], sizes[18 + levels + level]
        value, key = np.zeros(width, dtype), np.empty(d_k, dtype)
        salience = reward[0]
        if write == 2:
            at = _affine(weights, at, both[: d_s + d_e + 1], 1, between)
            salience = between[0]
            at = _affine(weights, at, both[: d_s + d_e], width, value)
            at = _affine(weights, at, both[: d_s + d_e], d_k, key)
        else:
            for i in range(width):
                row = weights[projections + i * d_c : projections + (i + 1) * d_c]
                for j in range(d_c):
                    value[i] += row[j] * e[j]
            projections += width * d_c
            for i in range(d_k):
                key[i] = query[i]
        length = zero
        for i in range(d_k):
            length += key[i] * key[i]
        length = np.sqrt(length + dtype.type(1e-12))
        for i in range(d_k):
            key[i] /= length
        opened = sigmoid((salience - theta) / tau)
        nearest, least, closest = 0, 0, dtype.type(-np.inf)
        retain = one - options[9 + level]
        for n in range(count):
            row, dot, length = keys[k + n * d_k : k + (n + 1) * d_k], zero, zero
            for i in range(d_k):
                dot += row[i] * key[i]
                length += row[i] * row[i]
            if length != 0 and dot > closest:
                closest, nearest = dot, n
            if usage[u + n] < usage[u + least]:
                least = n
            if length != 0:
                held = memory[m + n * width : m + (n + 1) * width]
                for i in range(width):
                    held[i] *= retain
        for n in range(count):
            usage[u + n] = usage[u + n] * (one - usage_decay) + attention[u + n]
        if opened >= threshold:
            j = nearest if closest > merge else least
            held, row = memory[m + j * width : m + (j + 1) * width], keys[k + j * d_k : k + (j + 1) * d_k]
            for i in range(width):
                held[i] += opened * (value[i] - held[i])
            length = zero
            for i in range(d_k):
                row[i] += opened * (key[i] - row[i])
                length += row[i] * row[i]
            length = np.sqrt(length)
            if length != 0:
                for i in range(d_k):
                    row[i] /= length
            usage[u + j] += opened
        m, k, u = m + count * width, k + count * d_k, u + count
