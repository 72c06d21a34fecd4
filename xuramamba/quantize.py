"""Language models with weights at fewer bits, for inference: on load, saved, and compared.

    lm = LanguageModel.from_pretrained(folder, dtype="int8")     # or quantize(lm, "int8")
    lm.save_pretrained(another)                                  # stays int8, a quarter of the size
    python -m xuramamba.quantize --model folder                  # what each width costs

The matrices of every projection, the embedding and the head are stored at the width asked for; one
whose inputs are no multiple of 32 is stored as bfloat16.  Everything small (norms, convolutions, A, D,
dt_proj) stays float32, and so does all arithmetic.
"""

import argparse
from pathlib import Path

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


def table(directory, token_ids, widths=WIDTHS):
    """The comparison of each width with float32 for the model in ``directory``, as lines of Markdown."""
    from xuramamba.language_model import LanguageModel

    exact = LanguageModel.from_pretrained(directory)
    lines = [
        "| width | MB | logit error, mean | max | same best token | KL, nats | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in widths:
        other = LanguageModel.from_pretrained(directory, dtype=width)
        found = compare(exact, other, token_ids)
        lines.append(
            f"| {width} | {stored_bytes(other) / 1e6:.1f} | {found['mean']:.2g} | {found['max']:.2g} | "
            f"{found['top_1']:.1%} | {found['divergence']:.2g} | {found['perplexity']:.4g} "
            f"({found['perplexity'] / found['exact_perplexity'] - 1:+.2%}) |"
        )
    return lines


def _token_ids(directory, text, length):
    """(1, L) ids of a text file, or of random tokens where none is given."""
    from xuramamba.language_model import LanguageModelConfig
    from xuramamba.pretrained import config_fields, open_weights, own_names, read_config
    from xuramamba.tokenizer import load_tokenizer

    with open_weights(directory) as file:
        shapes = {own: file.shape(name) for own, name in own_names(file).items()}
    config = LanguageModelConfig.from_dict(config_fields(read_config(directory), shapes, directory))
    if text is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    ids = load_tokenizer(directory).encode(Path(text).read_text(encoding="utf-8"))[:length]
    return np.array([ids])


def main(arguments=None):
    """``python -m xuramamba.quantize``."""
    parser = argparse.ArgumentParser(
        prog="python -m xuramamba.quantize",
        description="Compare a model stored as bfloat16, int8 and int4 with its float32 form, or save one.",
    )
    parser.add_argument("--model", required=True, help="folder of a language model")
    parser.add_argument("--text", help="file whose tokens are scored (default: random tokens)")
    parser.add_argument("--tokens", type=int, default=256, help="how many, at most (default 256)")
    parser.add_argument("--width", choices=WIDTHS[1:], help="with --output: the width to save")
    parser.add_argument("--output", help="folder to save the model in, stored at --width")
    given = parser.parse_args(arguments)
    if (given.width is None) != (given.output is None):
        parser.error("--width and --output belong together")
    if given.output:
        from xuramamba.language_model import LanguageModel

        LanguageModel.from_pretrained(given.model, dtype=given.width).save_pretrained(given.output)
        return
    for line in table(given.model, _token_ids(given.model, given.text, given.tokens)):
        print(line)


if __name__ == "__main__":
    main()
