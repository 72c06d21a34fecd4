"""What storing a model at fewer bits costs, as a table; or the model saved so.

    python -m xuramamba.compare_widths --model FOLDER [--text FILE]
    python -m xuramamba.compare_widths --model FOLDER --width int8 --output ANOTHER
"""

import argparse
from pathlib import Path

import numpy as np

from xuracore.nn.quantized import WIDTHS
from xuramamba.language_model import LanguageModel, LanguageModelConfig
from xuramamba.pretrained import config_fields, open_weights, own_names, read_config
from xuramamba.quantize import compare, stored_bytes
from xuramamba.tokenizer import load_tokenizer


def table(directory, token_ids, widths=WIDTHS):
    """The comparison of each width with float32 for the model in ``directory``, as lines of Markdown."""
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
    with open_weights(directory) as file:
        shapes = {own: file.shape(name) for own, name in own_names(file).items()}
    config = LanguageModelConfig.from_dict(config_fields(read_config(directory), shapes, directory))
    if text is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    ids = load_tokenizer(directory).encode(Path(text).read_text(encoding="utf-8"))[:length]
    return np.array([ids])


def main(arguments=None):
    """``python -m xuramamba.compare_widths``."""
    parser = argparse.ArgumentParser(
        prog="python -m xuramamba.compare_widths",
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
        LanguageModel.from_pretrained(given.model, dtype=given.width).save_pretrained(given.output)
        return
    for line in table(given.model, _token_ids(given.model, given.text, given.tokens)):
        print(line)


if __name__ == "__main__":
    main()
