"""A few training steps of WaveCore on episodes, to see that everything works: a row of CSV for each."""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import positive, run_script
from training.wavecore import episodes, simulate, trainer
from xuramamba.wavecore import CoreModelConfig, make_core_model
from xuramamba.wavecore.checkpoint import save_model


def add_data_options(parser, preset, obs_dim, action_dim):
    """The options of every WaveCore script that say on what, and of what size."""
    parser.add_argument("--rlds-dir", metavar="DIR", help="folder of episodes, one JSON file each")
    parser.add_argument("--use-synthetic", action="store_true", help="simulated episodes: the default")
    parser.add_argument("--episodes", type=positive, default=64, metavar="N", help="to simulate (default 64)")
    parser.add_argument("--arch-preset", default=preset, help=f"sizes of the model (default {preset})")
    parser.add_argument("--obs-dim", type=positive, default=obs_dim, metavar="N")
    parser.add_argument("--action-dim", type=positive, default=action_dim, metavar="N")
    parser.add_argument("--output-dim", type=positive, default=action_dim, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def data_of(args):
    """The episodes that the options name, checked."""
    if args.rlds_dir and not args.use_synthetic:
        return episodes.load_episodes(args.rlds_dir, args.obs_dim, args.output_dim)
    with tempfile.TemporaryDirectory() as folder:
        simulate.generate(Path(folder), args.episodes, args.seed)
        return episodes.load_episodes(folder, args.obs_dim, args.output_dim)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_options(parser, "pi5", 128, 32)
    parser.add_argument("--max-steps", type=positive, default=10, metavar="N")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--sparsity-lambda", type=float, default=0.0, help="weight of the mean absolute parameter")
    parser.add_argument("--metrics-path", metavar="FILE", help="write the rows here instead of to the terminal")
    parser.add_argument("--checkpoint-dir", metavar="DIR", help="save the model here")
    args = parser.parse_args(argv)
    data = data_of(args)
    model, variables = make_core_model(args.seed, args.obs_dim, args.action_dim, args.output_dim,
                                       CoreModelConfig.preset(args.arch_preset))
    rows = trainer.train(
        model, variables["params"], data, steps=args.max_steps, batch=args.batch_size, length=16,
        lr=args.learning_rate, seed=args.seed, sparsity_lambda=args.sparsity_lambda,
    )  # fmt: skip
    if args.checkpoint_dir:
        save_model(args.checkpoint_dir, model, variables, {"final_loss": rows[-1]["loss"], "rlds_episodes": len(data)})
    with open(args.metrics_path, "w", newline="") if args.metrics_path else sys.stdout as file:
        writer = csv.DictWriter(file, trainer.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if args.metrics_path:
        print(json.dumps({"steps": len(rows), "first_loss": rows[0]["loss"], "final_loss": rows[-1]["loss"]}))
    return 0


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
