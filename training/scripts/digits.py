"""Handwritten digits from pictures to a measured model: export, train, evaluate, and compare with a linear probe.

The 1797 digits that come with scikit-learn (8 × 8 pixels; Alpaydin & Kaynak 1998) are written as PNG files with a
manifest, and from there on go the way of anybody's pictures: phase 1 with an X-Encoder that learns from nothing,
then the accuracy on the digits that no training saw, every fifth one.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import metrics, options, probe
from training.data.dataset import open_dataset
from training.data.manifest import Sample, write_manifest
from training.phases.common import row_picture
from training.scripts import train_jepa
from xuracore import io, no_grad
from xuracore.errors import MissingExtraError
from xuravljepa import image as images
from xuravljepa.model import SHIPPED, VLJEPA

EPILOG = """\
Needs the extra 'digits' (scikit-learn), for the pictures alone.

examples:
  python training/scripts/digits.py                      all of it, in minutes on one thread
  python training/scripts/digits.py --export-only        pictures and manifest, to look at
"""
QUESTION = "which digit is it?"
RECIPE = ["--train-encoder", "--image-size", "8", "--patch-size", "2", "--augment", "1", "--turns", "1", "--batch-size",
          "64", "--typos", "0"]


def split_of(number):
    """The split of picture ``number``: every fifth is for the test, one in twenty is watched while training."""
    return "test" if number % 5 == 0 else "val" if number % 20 == 7 else "train"


def export(folder):
    """Write the digits as images/0000.png … and manifest.jsonl.  Raises MissingExtraError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError("scikit-learn", "digits") from None
    digits, rows = load_digits(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (strength, digit) in enumerate(zip(digits.images, digits.target)):
        place = Path("images") / f"{number:04d}.png"
        Image.fromarray(np.round(strength * (255 / 16)).astype(np.uint8)).save(folder / place)  # strengths are 0 … 16
        rows.append(Sample(f"digit-{number:04d}", place, QUESTION, str(digit), type="digit", split=split_of(number)))
    write_manifest(folder / "manifest.jsonl", rows)


def pixels_of(rows):
    """(n, 64): the grey levels of the rows' pictures."""
    return np.stack([np.asarray(images.read_rgb(row_picture(row)))[:, :, 0].ravel() for row in rows]) / 255


@no_grad()
def features_of(model, rows, whole, batch_size=256):
    """What the model's X-Encoder says: all tokens (n, tokens · d), or [CLS] and the mean of the patches (n, 2 d)."""
    found = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        pixels = [images.prepare(row_picture(row), model.config.preprocessing) for row in chosen]
        tokens = model.visual_tokens(np.stack(pixels))
        pooled = np.hstack([tokens[:, 0], tokens[:, 1:].mean(axis=1)])
        found.append(tokens.reshape(len(tokens), -1) if whole else pooled)
    return np.concatenate(found)


def measure(folder, model_folder, resamples=1000):
    """{what answers: {"accuracy", "low", "high"}} on the test split, in percent, with 95 % intervals."""
    rows = {split: open_dataset(folder, split=split).rows for split in ("train", "val", "test")}
    known, unseen = [*rows["train"], *rows["val"]], rows["test"]
    truth, labels = np.array([row.answer for row in unseen]), [row.answer for row in known]
    model = VLJEPA.from_pretrained(model_folder)
    said = {"VL-JEPA, X-Encoder trained": np.array([model.answer(row.image, row.query) for row in unseen])}
    inputs = {"linear probe on pixels": pixels_of,
              "linear probe on the tokens of this X-Encoder": lambda rows: features_of(model, rows, True)}
    if (SHIPPED / "tiny" / "model.safetensors").exists():
        tiny = VLJEPA.from_pretrained("tiny")  # has seen generated scenes alone
        inputs["linear probe on the shipped X-Encoder, frozen"] = lambda rows: features_of(tiny, rows, False)
    for name, function in inputs.items():
        said[name] = probe.fit_best(function(known), labels).classes(function(unseen))
    result = {}
    for name, found in said.items():
        right = found == truth
        low, high = metrics.bootstrap_interval(np.mean, right, rng=np.random.default_rng(0), resamples=resamples)
        result[name] = {"accuracy": 100 * float(right.mean()), "low": 100 * low, "high": 100 * high}
    return result, len(unseen)


def table(result, count):
    """The result as a Markdown table."""
    lines = [f"| on {count} unseen digits | right | 95 % interval |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {found['accuracy']:.1f} % | {found['low']:.1f} to {found['high']:.1f} |"
                              for name, found in result.items()])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data/digits", metavar="DIR", help="where the pictures go (default "
                        "data/digits); a manifest.jsonl that is there is used")
    parser.add_argument("--output-dir", default="runs/digits", metavar="DIR", help="default runs/digits")
    parser.add_argument("--steps", type=options.positive, default=1500, metavar="N", help="default 1500")
    parser.add_argument("--lr", type=float, default=2e-3, help="default 2e-3")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=options.positive, default=1, metavar="N", help="default 1")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where --output-dir holds a run")
    parser.add_argument("--export-only", action="store_true", help="only write pictures and manifest")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    folder, output = Path(args.data_dir), Path(args.output_dir)
    if not (folder / "manifest.jsonl").exists():
        export(folder)
    if args.export_only:
        return 0
    started = time.monotonic(), time.process_time()
    flags = [f"--{name}" for name in ("resume", "overwrite", "quiet") if getattr(args, name)]
    code = train_jepa.main([*RECIPE, "--data-dir", str(folder), "--output-dir", str(output), "--steps", str(args.steps),
                            "--lr", str(args.lr), "--seed", str(args.seed), "--threads", str(args.threads), *flags])
    if code or not (output / "model").exists():
        return code
    minutes = {"minutes": (time.monotonic() - started[0]) / 60,
               "processor_minutes": (time.process_time() - started[1]) / 60}
    result, count = measure(folder, output / "model")
    io.save_json(output / "digits.json", {"unseen": count, **minutes, "accuracy": result})
    print(table(result, count))
    print(json.dumps({name: round(value, 1) for name, value in minutes.items()} | {"threads": args.threads}))
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
