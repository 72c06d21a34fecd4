"""Train the WaveCore seed on episodes, with held-out losses beside the baselines; save, go on, promote."""

import argparse
import json
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import positive, run_script
from training.scripts.local_sanity_check import add_data_options, data_of
from training.wavecore import baselines, nested, trainer
from xuracore.errors import ConfigError
from xuracore.io.strict_json import save_json
from xuramamba.wavecore import CoreModelConfig, make_core_model
from xuramamba.wavecore.checkpoint import CONFIG, MANIFEST, describe, load_model, save_model

EPILOG = """\
--continue goes on with the last params_step_N in --checkpoint-dir; --promote copies the result to
seed_stable/ beside it.

example:
  python training/scripts/train_seed_model.py --steps 400 --lr 3e-3 --promote
"""


def last_step(folder):
    """(number, folder) of the newest checkpoint, or (0, None)."""
    found = [(int(path.name.rpartition("_")[2]), path) for path in folder.glob("params_step_*")
             if path.name.rpartition("_")[2].isdigit()]
    return max(found, default=(0, None))


def promote(source, model, variables, args, steps, count, losses):
    """Copy a checkpoint to seed_stable/ beside the checkpoint folder."""
    target = Path(args.checkpoint_dir).resolve().parent / "seed_stable"
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)
    about = describe(model)
    save_json(target / MANIFEST, {
        "version": "1.0.0", "type": "stable_seed_model",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"type": "wavecore_seed", "architecture": "wavecore_cms", "preset": args.arch_preset,
                  "param_count": model.param_count(variables)},
        "param_count": model.param_count(variables), "config": about["config"], "input_dims": about["input_dims"],
        "output_dim": about["output_dim"], "training": {"steps": steps, "rlds_episodes": count, **losses},
    })  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser, "seed", 64, 7)
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="default 100")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N")
    parser.add_argument("--length", type=positive, default=32, metavar="N", help="of backpropagation (default 32)")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the fast group (default 2e-4)")
    for group, period in nested.PERIODS.items():
        parser.add_argument(f"--{group}-period", type=positive, default=period, metavar="N",
                            help=f"steps between changes of the {group} group (default {period})")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="go on from the last checkpoint")
    parser.add_argument("--promote", action="store_true", help="copy the result to seed_stable/")
    parser.add_argument("--checkpoint-dir", default="runs/core_model_seed", metavar="DIR")
    parser.add_argument("--save-every", type=positive, default=50, metavar="STEPS", help="default 50")
    args = parser.parse_args(argv)
    folder = Path(args.checkpoint_dir)
    data = data_of(args)
    held, train = data[::5], [episode for i, episode in enumerate(data) if i % 5]
    if not train:
        raise ConfigError(f"{len(data)} episodes; expected at least 2, as every fifth is held out")
    done, newest = last_step(folder) if args.go_on else (0, None)
    if args.go_on and newest is None:
        raise ConfigError(f"--continue: {folder} holds no params_step_N; leave the option out to begin")
    if newest is None:
        model, variables = make_core_model(args.seed, args.obs_dim, args.action_dim, args.output_dim,
                                           CoreModelConfig.preset(args.arch_preset))
    else:
        model, variables = load_model(newest)

    def keep(step, row):
        if step % args.save_every == 0 or step == args.steps:
            about = {"final_loss": row["loss"], "rlds_episodes": len(data)}
            save_model(folder / f"params_step_{done + step}", model, variables, about)

    periods = {group: getattr(args, f"{group}_period") for group in nested.PERIODS}
    rows = trainer.train(model, variables["params"], train, steps=args.steps, batch=args.batch_size,
                         length=args.length, lr=args.lr, periods=periods, seed=args.seed + done, after_step=keep)
    losses = {"final_loss": rows[-1]["loss"], "heldout_loss": trainer.evaluate(model, variables, held),
              **baselines.losses(train, held)}
    save_model(folder, model, variables, {"final_loss": rows[-1]["loss"], "rlds_episodes": len(data)})
    if args.promote:
        steps = done + args.steps
        promote(folder / f"params_step_{steps}", model, variables, args, steps, len(data), losses)
    print(json.dumps({"steps": done + args.steps, "config": str(folder / CONFIG), **losses}))
    return 0


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
