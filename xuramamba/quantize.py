"""Language models with weights at fewer bits, for inference: on load, saved, and compared.

    lm = LanguageModel.from_pretrained(folder, dtype="int8")     # or quantize(lm, "int8")
    lm.save_pretrained(another)                                  # stays int8, a quarter of the size
    python -m xuramamba.compare_widths --model folder            # what each width costs

The matrices of every projection, the embedding and the head are stored at the width asked for; one
whose inputs are no multiple of 32 is stored as bfloat16.  Everything small (norms, convolutions, A, D,
dt_proj) stays float32, and so does all arithmetic.
"""

import numpy as np

from xuracore import nn
from xuracore.autograd import no_grad
from xuracore.config import require
from xuracore.kernels.gemv import GROUP
from xuracore.nn.quantized import WIDTHS, QuantizedEmbedding, QuantizedLinear, Stored

KEPT = ("dt_proj",)  # sensitive and small: 2 % of a Mamba-1 layer


def quantize(model, width, before=None):
    """Store the matrices of a LanguageModel at ``width`` (one of WIDTHS); returns the model, changed.

    before : called with each layer just before its matrix is stored, to fill it in: then only one matrix
        at a time takes the room of its float32 form.
    Raises ConfigError for another width or a model that is quantised already.
    """
    require(width in WIDTHS, f"width is {width!r}; expected one of {', '.join(WIDTHS)}")
    present = width_of(model)
    require(present == "float32", f"the model is stored as {present} already; quantise the float32 one")
    if width != "float32":
        for module in list(model.modules()):
            for name, child in list(module.children()):
                if name not in KEPT and type(child) in (nn.Linear, nn.Embedding):
                    if before is not None:
                        before(child)
                    setattr(module, name, _stored(child, width))
        model.requires_grad_(False)
        model._decoder = None
    return model


def width_of(model):
    """The width at which the model's matrices are stored."""
    widths = {module.width for module in model.modules() if isinstance(module, Stored)}
    return next((width for width in reversed(WIDTHS) if width in widths), "float32")


def _stored(module, width):
    if width != "bfloat16" and module.weight.shape[1] % GROUP:
        width = "bfloat16"
    if type(module) is nn.Embedding:
        return QuantizedEmbedding(module.weight.data, width)
    return QuantizedLinear(module.weight.data, width, None if module.bias is None else module.bias.data)


def stored_bytes(model):
    """Bytes of all parameters and buffers."""
    return sum(array.nbytes for array in model.state_dict().values())


def compare(exact, other, token_ids):
    """How the logits of ``other`` differ from those of ``exact`` on token_ids (B, L): a dict.

    mean, max : absolute difference of logits; top_1 : share of positions with the same best token;
    divergence : mean KL(exact ‖ other) in nats; perplexity, exact_perplexity : of the next tokens.
    """
    with no_grad():
        one, two = (np.asarray(lm(token_ids)[0].data, np.float64) for lm in (exact, other))
    vocabulary = exact.config.vocab_size
    one, two = one[..., :vocabulary], two[..., :vocabulary]
    logs = [x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (one, two)]
    following = np.asarray(token_ids)[:, 1:, None]
    losses = [-np.take_along_axis(x[:, :-1], following, axis=-1).mean() for x in logs]
    return {
        "mean": np.abs(one - two).mean(),
        "max": np.abs(one - two).max(),
        "top_1": (one.argmax(axis=-1) == two.argmax(axis=-1)).mean(),
        "divergence": (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean(),
        "exact_perplexity": np.exp(losses[0]),
        "perplexity": np.exp(losses[1]),
    }
