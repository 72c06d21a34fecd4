"""Make the tiny model from nothing: all phases in order, then measure it."""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from training import options
from training.data.dataset import Dataset
from training.scripts import evaluate, pretrain_vit, train_agent, train_decoder, train_jepa
from xuracore import __version__, get_num_threads, io, set_num_threads
from xuravljepa.model import SHIPPED

EPILOG = """\
Less than two hours on one core.  Interrupted, the same command with --resume goes on where it stopped.  The
result lies in OUTPUT/model; with --install it becomes the model that Agent.from_pretrained("tiny") loads.

  python training/scripts/reproduce_tiny.py --output-dir runs/tiny
"""
SCENES = 12_000
FILES = ("config.json", "model.safetensors", "agent.json", "agent.safetensors", "prices.json")


def phases(root, seed):
    """(name, script's main, its options) in order.

    Phase 1 comes in four parts: to see and to find, asked in a few ways; to compare places, which is learned alone or
    late; then everything, in all wordings, and captions; then the same at a falling rate, with more of what takes
    longest to learn.
    """
    common = ["--seed", str(seed)]
    wide = ["--scenes", "4000", "--batch-size", "16", "--lesson", "0", "--lr", "1e-3"]
    return [
        ("vit", pretrain_vit.main, ["--steps", "3000", *common]),
        ("plain", train_jepa.main, ["--vit", f"{root}/vit/model", "--scenes", str(SCENES), "--steps", "5000",
                                    "--wordings", "plain", "--typos", "0", *common]),
        ("places", train_jepa.main, ["--model", f"{root}/plain/model", "--scenes", "4000", "--steps", "900",
                                     "--wordings", "plain", "--typos", "0", "--lesson", "0", "--schedule", "constant",
                                     "--warmup", "100", "--only", "left_of", "above", "horizontal", "vertical",
                                     "--seed", str(seed + 5)]),
        ("wide", train_jepa.main, ["--model", f"{root}/places/model", *wide, "--steps", "3000", "--warmup", "100",
                                   "--schedule", "constant", "--ema", "0.998", *common]),
        ("jepa", train_jepa.main, ["--model", f"{root}/wide/model", *wide, "--steps", "1200", "--warmup", "50",
                                   "--schedule", "linear", "--twice", "left_of", "above", "compare_count",
                                   "--seed", str(seed + 1)]),
        ("decoder", train_decoder.main,
         ["--model", f"{root}/jepa/model", "--scenes", "300", "--caption-scenes", "6000", "--steps", "10000",
          "--lesson", "5000", *common]),
        ("agent", train_agent.main,
         ["--model", f"{root}/decoder/model", "--steps", "800", "--monitor-scenes", "7000", *common]),
    ]


def finished(folder):
    return (folder / "model" / "config.json").exists() and (folder / "metrics.json").exists()


def manifest(root, seed, minutes):
    """What made the model, and what it can do: data hash, commands, metrics, versions, file hashes."""
    data = Dataset.scenes("train", 200, 0), Dataset.tools("train", 200, 0)
    return {
        "made_by": f"python training/scripts/reproduce_tiny.py --seed {seed}",
        "commands": {name: [Path(sys.modules[main.__module__].__file__).name, *arguments]
                     for name, main, arguments in phases("OUTPUT", seed)},
        "seed": seed,
        "minutes": minutes,
        "threads": get_num_threads(),
        "data": {"scenes": SCENES, "sha256_of_first_200_scenes": [part.fingerprint() for part in data]},
        "versions": {"xura": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "metrics": {name: io.load_json(root / name / "metrics.json") for name, _, _ in phases(root, seed)},
        "evaluation": json.loads(json.dumps(io.load_json(root / "evaluation.json")).replace(str(root), "OUTPUT")),
        "files": {name: hashlib.sha256((root / "model" / name).read_bytes()).hexdigest() for name in FILES},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="runs/tiny", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=options.positive, metavar="N")
    parser.add_argument("--resume", action="store_true", help="keep what is finished, go on with what is not")
    parser.add_argument("--install", action="store_true", help="make the result the shipped model of this checkout")
    args = parser.parse_args(argv)
    if args.threads:
        set_num_threads(args.threads)
    root = Path(args.output_dir)
    minutes = io.load_json(root / "minutes.json") if args.resume and (root / "minutes.json").exists() else {}
    for name, script, arguments in phases(root, args.seed):
        if args.resume and finished(root / name):
            print(f"{name}: finished before", file=sys.stderr)
            continue
        started = time.monotonic()
        extra = ["--resume"] if args.resume else ["--overwrite"]
        code = script([*arguments, "--output-dir", str(root / name), *extra])
        minutes[name] = round(minutes.get(name, 0) + (time.monotonic() - started) / 60, 1)
        io.save_json(root / "minutes.json", minutes)
        if code:
            return code
    (root / "model").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(root / "agent" / "model" / name, root / "model" / name)
    evaluate.main(["--model", str(root / "model"), "--json", str(root / "evaluation.json")])
    io.save_json(root / "model" / "manifest.json", manifest(root, args.seed, minutes))
    if args.install:
        for name in (*FILES, "manifest.json"):
            (SHIPPED / "tiny").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / "model" / name, SHIPPED / "tiny" / name)
    print(f"the model lies in {root / 'model'}; minutes taken: {minutes}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
