"""One token at a time without the tape: each layer is two kernels that read every weight once.

The numbers are those of ``model(token_ids, state)`` within float32 rounding, the states are the same
named tuples.  Layers that have no such kernel (other mixers, MLPs, other sizes) are called as they are.
"""

from dataclasses import MISSING, fields

import numpy as np

from xuracore import allocator, nn
from xuracore.kernels import decode as kernels
from xuracore.kernels.gemv import PANEL, gemv
from xuracore.nn.quantized import QuantizedEmbedding, QuantizedLinear
from xuracore.tensor import Tensor
from xuramamba.mamba1 import Mamba1, Mamba1State
from xuramamba.mamba2 import Mamba2, Mamba2State

TASKS = 8  # of a layer, at most: enough for eight threads, few enough that partial sums are cheap
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
_NO_SCALES, _NO_NORM = np.empty((0, 0, 0), np.uint16), np.empty((0, 0), np.float32)


def decoder_of(model):
    """The Decoder of a LanguageModel: the one made before, unless arrays have been replaced since."""
    known = vars(model).get("_decoder")
    if known is None or not known.is_current():
        model._decoder = known = Decoder(model)
    return known


class Decoder:
    """``logits, state = decoder(token_ids, state)``: token_ids (B,), logits (B, padded_vocab_size) array.

    Refers to the arrays of the model's parameters; what training writes into them counts at once.
    """

    def __init__(self, model):
        self.model = model
        self._arrays = [(parameter, parameter.data) for parameter in model.parameters()]
        self._layers = [_layer_step(layer) for layer in model.backbone.layers]
        head = model.backbone.embedding if model.config.tie_embeddings else model.lm_head
        self._head = _matrix(head)
        arrays = [array for array in model.state_dict().values() if isinstance(array, np.ndarray)]
        allocator.lay_on_huge_pages(arrays)

    def is_current(self):
        """Whether the model still consists of the arrays it had."""
        return all(parameter.data is array for parameter, array in self._arrays)

    def __call__(self, token_ids, state, into=None):
        """into : an earlier state that is no longer needed; its arrays may be overwritten."""
        backbone, after = self.model.backbone, []
        x = np.array(backbone.embedding(np.asarray(token_ids)).data)  # (B, D), changed by every layer
        for i, (layer, step, past) in enumerate(zip(backbone.layers, self._layers, state)):
            if step is None or past is None or x.dtype != np.float32:
                y, new = layer(Tensor(x[:, None]), past)
                x = np.ascontiguousarray(y.data[:, 0])
            else:
                new = step(x, past, None if into is None else into[i])
            after.append(new)
        hidden = backbone.norm_f(Tensor(x))
        if self._head is None or x.dtype != np.float32:
            return self.model.logits(hidden).data, tuple(after)
        weight, scales, bias = self._head
        logits = np.empty((len(x), len(bias)), np.float32)
        gemv.sized(weight.size * len(x))(weight, scales, bias, hidden.data, HEAD_TASKS, logits)
        return logits, tuple(after)


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


def _layer_step(layer):
    """``step(x, state, into) → state`` of a residual block, or None where no kernel fits."""
    if layer._has_mlp or not isinstance(layer.norm, nn.RMSNorm):
        return None
    found = {Mamba1: _mamba1, Mamba2: _mamba2}.get(type(layer.mixer), lambda layer: None)(layer)
    if found is None:
        return None
    run, state_type = found

    def step(x, past, into):
        before = [np.ascontiguousarray(part.data) for part in past]
        after = [np.empty_like(part) for part in before] if into is None else [part.data for part in into]
        if any(one.shape != other.shape for one, other in zip(before, after)):
            after = [np.empty_like(part) for part in before]
        run(x, *before, *after)
        return state_type(*map(Tensor, after))

    return step


def _is_plain(config, known):
    """Whether a configuration differs from its defaults only in ``known`` fields."""
    return all(
        field.name in known or field.default is not MISSING and getattr(config, field.name) == field.default
        for field in fields(config)
    )


def _common(layer):
    """Arguments that both kinds begin with, and those of the convolution; None if a matrix is no float32."""
    mixer = layer.mixer
    matrices = [_matrix(mixer.in_proj), _matrix(mixer.out_proj)]
    conv = mixer.conv1d
    channels, _, size = conv.weight.shape
    bias = np.zeros(channels, np.float32) if conv.bias is None else conv.bias.data
    own = [layer.norm.weight, *mixer.parameters()]
    if None in matrices or any(parameter.dtype == np.float64 for parameter in own):
        return None
    into, out = matrices
    return (layer.norm.weight.data, layer.norm.eps, *into), (conv.weight.data.reshape(channels, size), bias), out


def _mamba1(layer):
    mixer, c, common = layer.mixer, layer.mixer.config, _common(layer)
    narrow, widen = _matrix(mixer.x_proj), _matrix(mixer.dt_proj)
    if not _is_plain(c, MAMBA1_FIELDS) or c.d_inner % PANEL or None in (common, narrow, widen):
        return None
    first, conv, out = common
    out_weight, out_scales, out_bias = out
    eps, tasks = c.mixer_rms_eps, min(TASKS, c.d_inner // PANEL)
    project = (*first, *conv, *narrow[:2])
    scan = (-1.0 if eps is None else eps, *widen, mixer.A_log.data, mixer.D.data, out_weight, out_scales)
    work = _size(project) + _size(scan)

    def run(x, conv_in, h_in, conv_out, h_out):
        batch, width = x.shape
        gate, u = _empty(batch, c.d_inner), _empty(batch, c.d_inner)
        mixes, parts = _empty(tasks, batch, c.rank + 2 * c.d_state), _empty(tasks, batch, width)
        kernels.mamba1_project.sized(work)(x, *project, conv_in, conv_out, gate, u, mixes)
        kernels.mamba1_scan.sized(work)(mixes, *scan, gate, u, h_in, h_out, parts)
        kernels.finish.sized(0)(x, out_bias, parts, _NO_NORM, 1, 1, 0.0)

    return run, Mamba1State


def _mamba2(layer):
    mixer, c, common = layer.mixer, layer.mixer.config, _common(layer)
    if not _is_plain(c, MAMBA2_FIELDS) or common is None:
        return None
    per_group = c.heads // c.ngroups
    runs = [
        n for n in range(1, per_group + 1)
        if per_group % n == 0 and per_group // n * c.headdim % PANEL == 0 and n * c.ngroups <= max(TASKS, c.ngroups)
    ]  # fmt: skip
    if not runs:
        return None
    first, conv, out = common
    gating, weight, eps = kernels.GATE_ONLY, np.ones(c.d_inner, np.float32), 0.0
    if c.rmsnorm:
        gating = kernels.NORM_THEN_GATE if c.norm_before_gate else kernels.GATE_THEN_NORM
        weight, eps = mixer.norm.weight.data, c.norm_eps
    low, high = c.dt_limit
    out_weight, out_scales, out_bias = out
    tasks = max(runs) * c.ngroups
    project = (*first, *conv, mixer.dt_bias.data, float(low), float(min(high, np.finfo(np.float32).max)))
    scan = (mixer.A_log.data, mixer.D.data.reshape(c.heads, -1), c.ngroups, gating)
    product = (weight, out_weight, out_scales)
    work = _size(project) + _size(product)
    channels = c.d_inner + 2 * c.ngroups * c.d_state

    def run(x, conv_in, h_in, conv_out, h_out):
        batch, width = x.shape
        gate, u, steps = _empty(batch, c.d_inner), _empty(batch, channels), _empty(batch, c.heads)
        y, squares, parts = _empty(batch, c.d_inner), _empty(tasks, batch), _empty(tasks, batch, width)
        kernels.mamba2_project.sized(work)(x, *project, conv_in, conv_out, gate, u, steps, tasks)
        kernels.mamba2_scan.sized(work)(u, steps, *scan, gate, *product, h_in, h_out, y, squares, parts)
        norm = squares if gating != kernels.GATE_ONLY else _NO_NORM
        kernels.finish.sized(0)(x, out_bias, parts, norm, c.ngroups, c.d_inner // c.ngroups, eps)

    return run, Mamba2State


def _empty(*shape):
    return np.empty(shape, np.float32)


def _size(arguments):
    return sum(a.size for a in arguments if isinstance(a, np.ndarray))
