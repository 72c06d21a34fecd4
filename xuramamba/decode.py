"""One token at a time without the tape: each layer is two kernels that read every weight once.

The numbers are those of ``model(token_ids, state)`` within float32 rounding.  All kernels of a token, from the
first layer to the logits, are one program (:mod:`xuracore.program`), which works on the state where it lies.
Layers that have no such kernel (MLPs, some sizes and options) are called as they are.
"""

from dataclasses import MISSING, fields
from functools import partial

import numpy as np

from xuracore import allocator, nn
from xuracore.errors import ShapeError
from xuracore.kernels import decode as kernels
from xuracore.kernels.decode_mamba3 import mamba3_scan
from xuracore.kernels.gemv import PANEL, gemv
from xuracore.nn.quantized import QuantizedEmbedding, QuantizedLinear
from xuracore.program import Program
from xuracore.tensor import Tensor
from xuramamba.mamba1 import Mamba1
from xuramamba.mamba2 import Mamba2
from xuramamba.mamba3 import Mamba3
from xuramamba.state import leaves, map_state

TASKS = 8  # of a kernel, at most: enough for eight threads
HEAD_TASKS = 16
MAMBA1_FIELDS = {
    "d_model", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias", "dt_min", "dt_max", "dt_scale",
    "dt_init_floor", "mixer_rms_eps",
}  # fmt: skip
MAMBA2_FIELDS = {
    "d_model", "d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size", "rmsnorm",
    "norm_before_gate", "norm_eps", "dt_limit", "D_has_hdim", "bias", "conv_bias", "A_init_range", "dt_min",
    "dt_max", "dt_init_floor",
}  # fmt: skip
MAMBA3_FIELDS = {
    "d_model", "d_state", "expand", "headdim", "ngroups", "rope_fraction", "is_mimo", "mimo_rank",
    "is_outproj_norm", "a_activation", "rotary", "rope", "rope_theta", "trap", "bc_bias", "bc_bias_init", "bc_norm",
    "dt_min", "dt_max", "dt_init_floor", "a_floor", "norm_eps",
}  # fmt: skip
_NO_SCALES, _NO_NORM = np.empty((0, 0, 0), np.uint16), np.empty((0, 0), np.float32)


def decoder_of(model):
    """The Decoder of a LanguageModel: the one made before, unless arrays have been replaced since."""
    known = vars(model).get("_decoder")
    if known is None or not known.is_current():
        model._decoder = known = Decoder(model)
    return known


class Decoder:
    """``session(state)`` goes on from a state.

    Refers to the arrays of the model's parameters; what training writes into them counts at once.
    """

    def __init__(self, model):
        self.model = model
        self._arrays = [(parameter, parameter.data) for parameter in model.parameters()]
        self.layers = [_layer_calls(layer) for layer in model.backbone.layers]
        self.head = _matrix(model.backbone.embedding if model.config.tie_embeddings else model.lm_head)
        arrays = [array for array in model.state_dict().values() if isinstance(array, np.ndarray)]
        allocator.lay_on_huge_pages(arrays)

    def is_current(self):
        """Whether the model still consists of the arrays it had."""
        return all(parameter.data is array for parameter, array in self._arrays)

    def session(self, state):
        """A :class:`Session` from ``state`` on, which it copies."""
        return Session(self, state)


class Session:
    """``logits = session.step(token_ids)``: token_ids (B,), logits (B, padded_vocab_size), valid until the next step.

    state : after the tokens so far, also valid until the next step, which writes into its arrays.  A step that
        is interrupted half way leaves it useless.
    """

    def __init__(self, decoder, state):
        self.decoder, self.state = decoder, ()
        backbone = decoder.model.backbone
        batch = len(state[0][0].data)
        self._x = np.array(backbone.embedding(np.zeros(batch, np.int64)).data)  # (B, D), changed by every layer
        self._parts, calls, room = [], [], _Room()
        narrow = self._x.dtype == np.float32
        for i, (layer, calls_of, past) in enumerate(zip(backbone.layers, decoder.layers, state, strict=True)):
            if narrow and calls_of is not None:
                past = map_state(_copy_into, layer.mixer.initial_state(batch), past)
                calls += calls_of(self._x, [part.data for part in past], room)
            else:
                self._parts += [Program(calls), partial(self._whole_layer, i, layer)]
                calls = []
            self.state += (past,)
        allocator.lay_on_huge_pages([part.data for part in leaves(self.state)])
        self._logits = None
        if narrow and decoder.head is not None and isinstance(backbone.norm_f, nn.RMSNorm):
            (weight, scales, bias), norm = decoder.head, backbone.norm_f
            self._logits = room("logits", batch, len(bias))
            last = (self._x, norm.weight.data, norm.eps, weight, scales, bias, HEAD_TASKS, self._logits)
            calls.append((kernels.project, HEAD_TASKS, last))
        self._parts.append(Program(calls))

    def step(self, token_ids):
        model, token_ids = self.decoder.model, np.asarray(token_ids)
        if len(token_ids) != len(self._x):
            raise ShapeError(f"there are {len(token_ids)} tokens for {len(self._x)} states")
        self._x[...] = model.backbone.embedding(token_ids).data
        for part in self._parts:
            part()
        if self._logits is not None:
            return self._logits
        return model.logits(model.backbone.norm_f(Tensor(self._x.copy()))).data

    def _whole_layer(self, i, layer):
        y, after = layer(Tensor(self._x[:, None].copy()), self.state[i])
        self._x[...] = y.data[:, 0]
        self.state = (*self.state[:i], after, *self.state[i + 1 :])


class _Room:
    """Arrays for what lies between two kernels; layers take turns in them."""

    def __init__(self):
        self._arrays = {}

    def __call__(self, name, *shape):
        return self._arrays.setdefault((name, shape), np.empty(shape, np.float32))


def _copy_into(mine, given):
    if mine.shape != given.shape:
        raise ShapeError(f"a part of the state has shape {given.shape}; this model has {mine.shape}")
    mine.data[...] = given.data
    return mine


def _matrix(module):
    """(weight, scales, bias) of a layer with a stored matrix; None for one that is not float32 inside."""
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        rows, weight, scales = module.shape[0], module.weight, module.scales
    elif isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.dtype == np.float32:
        rows, weight, scales = module.weight.shape[0], module.weight.data, _NO_SCALES
    else:
        return None
    bias = getattr(module, "bias", None)
    return weight, scales, np.zeros(rows, np.float32) if bias is None else bias.data


def _layer_calls(layer):
    """``calls(x, state, room) → [(kernel, tasks, arguments)]`` of a residual block, or None where no kernel fits."""
    if layer._has_mlp or not isinstance(layer.norm, nn.RMSNorm):
        return None
    return {Mamba1: _mamba1, Mamba2: _mamba2, Mamba3: _mamba3}.get(type(layer.mixer), lambda layer: None)(layer)


def _is_plain(config, known):
    """Whether a configuration differs from its defaults only in ``known`` fields."""
    return all(
        field.name in known or field.default is not MISSING and getattr(config, field.name) == field.default
        for field in fields(config)
    )


def _common(layer):
    """The norm with in_proj, and out_proj, as arguments; None if a matrix is no float32."""
    into, out = _matrix(layer.mixer.in_proj), _matrix(layer.mixer.out_proj)
    own = [layer.norm.weight, *layer.mixer.parameters()]
    if None in (into, out) or any(parameter.dtype == np.float64 for parameter in own):
        return None
    return (layer.norm.weight.data, layer.norm.eps, *into), out


def _convolution(conv):
    channels, _, size = conv.weight.shape
    bias = np.zeros(channels, np.float32) if conv.bias is None else conv.bias.data
    return conv.weight.data.reshape(channels, size), bias


def _mamba1(layer):
    mixer, c, common = layer.mixer, layer.mixer.config, _common(layer)
    narrow, widen = _matrix(mixer.x_proj), _matrix(mixer.dt_proj)
    if not _is_plain(c, MAMBA1_FIELDS) or c.d_inner % PANEL or None in (common, narrow, widen):
        return None
    first, out = common
    eps, tasks = c.mixer_rms_eps, min(TASKS, c.d_inner // PANEL)
    project = (*first, *_convolution(mixer.conv1d))
    rows = c.rank + 2 * c.d_state
    scan = (-1.0 if eps is None else eps, *widen, mixer.A_log.data, mixer.D.data)

    def calls(x, state, room):
        batch, (past, h) = len(x), state
        gate, u = room("gate", batch, c.d_inner), room("u", batch, c.d_inner)
        mix = room("mix", batch, rows)
        return [
            (kernels.mamba1_project, tasks, (x, *project, past, gate, u, tasks)),
            (gemv, -(-rows // PANEL), (*narrow, u, -(-rows // PANEL), mix)),
            (kernels.mamba1_scan, tasks, (mix, *scan, gate, u, h, tasks)),
            (kernels.residual, tasks, (x, u, _NO_NORM, 1, 1, 0.0, *out, tasks)),
        ]

    return calls


def _mamba2(layer):
    mixer, c, common = layer.mixer, layer.mixer.config, _common(layer)
    if not _is_plain(c, MAMBA2_FIELDS) or common is None:
        return None
    per_group = c.heads // c.ngroups
    most = max(TASKS // c.ngroups, 1)
    runs = [n for n in range(1, most + 1) if per_group % n == 0]
    first, out = common
    gating, weight, eps = kernels.GATE_ONLY, np.ones(c.d_inner, np.float32), 0.0
    if c.rmsnorm:
        gating = kernels.NORM_THEN_GATE if c.norm_before_gate else kernels.GATE_THEN_NORM
        weight, eps = mixer.norm.weight.data, c.norm_eps
    low, high = (float(min(limit, np.finfo(np.float32).max)) for limit in c.dt_limit)
    tasks = max(runs) * c.ngroups
    project = (*first, *_convolution(mixer.conv1d), mixer.dt_bias.data, low, high)
    scan = (mixer.A_log.data, mixer.D.data.reshape(c.heads, -1), c.ngroups, gating)
    channels = c.d_inner + 2 * c.ngroups * c.d_state

    def calls(x, state, room):
        batch, (past, h) = len(x), state
        gate, u, steps = room("gate", batch, c.d_inner), room("u", batch, channels), room("steps", batch, c.heads)
        y, squares = room("y", batch, c.d_inner), room("squares", tasks, batch)
        norm = squares if gating != kernels.GATE_ONLY else _NO_NORM
        return [
            (kernels.mamba2_project, tasks, (x, *project, past, gate, u, steps, tasks)),
            (kernels.mamba2_scan, tasks, (u, steps, *scan, gate, weight, h, y, squares)),
            (kernels.residual, tasks, (x, y, norm, c.ngroups, c.d_inner // c.ngroups, eps, *out, tasks)),
        ]

    return calls


def _mamba3(layer):
    mixer, c, common = layer.mixer, layer.mixer.config, _common(layer)
    if not _is_plain(c, MAMBA3_FIELDS) or c.rope == "standard" or common is None:
        return None
    (first, out), rows, tasks = common, sum(mixer._row_counts()), min(TASKS, c.heads)
    ones, by_rank = np.ones(max(c.d_inner, c.d_state), np.float32), (c.heads, c.rank, c.headdim)
    q_bias, k_bias = (part if isinstance(part, np.ndarray) else part.data for part in mixer._biases())
    norms = (mixer.B_norm.weight.data, mixer.C_norm.weight.data, c.norm_eps) if c.bc_norm else (
        ones[: c.d_state], ones[: c.d_state], -1.0)  # fmt: skip
    weights = [mixer.mimo_x, mixer.mimo_z, mixer.mimo_o] if c.is_mimo else []
    scan = (
        mixer.dt_bias.data, int(c.a_activation == "softplus"), float(c.a_floor),
        {"learned": -1.0, "half": 0.5, "euler": 1.0}[c.trap],
        *norms, k_bias, q_bias, int(c.rotary == "half"), mixer.D.data,
        *([each.data for each in weights] or [np.ones(by_rank, np.float32)] * 3),
        *((mixer.norm.weight.data, c.norm_eps) if c.is_outproj_norm else (ones[: c.d_inner], -1.0)), c.ngroups,
    )  # fmt: skip

    def calls(x, state, room):
        batch = len(x)
        projected, y = room("projected", batch, rows), room("y", batch, c.d_inner)
        return [
            (kernels.project, tasks, (x, *first, tasks, projected)),
            (mamba3_scan, tasks, (projected, *scan, *state, y, tasks)),
            (kernels.residual, tasks, (x, y, _NO_NORM, 1, 1, 0.0, *out, tasks)),
        ]

    return calls
