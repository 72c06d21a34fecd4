"""Measure whether a saved WaveCore may leave the seed phase: evaluation, tool router, stability, consolidation."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import positive, run_script
from training.wavecore import criteria, episodes, simulate, tool_router
from xuramamba.wavecore.checkpoint import load_model

CRITERIA = ("hope_eval", "tool_router", "lyapunov", "consolidation")
EPILOG = """\
--checkpoint-dir is what prove_learning_capability.py has written.  Episodes: --rlds-dir, or new simulated ones; every
fifth is held out.  The exit code is 0 if every criterion asked for is met, else 1.

examples:
  python training/scripts/wavecore_criteria.py --checkpoint-dir runs/core_model_seed
  python training/scripts/wavecore_criteria.py --only lyapunov consolidation
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", default="runs/core_model_seed", metavar="DIR")
    parser.add_argument("--rlds-dir", metavar="DIR", help="folder of episodes")
    parser.add_argument("--episodes", type=positive, default=100, metavar="N", help="to simulate (default 100)")
    parser.add_argument("--trials", type=positive, default=256, metavar="N", help="of each lag (default 256)")
    parser.add_argument("--only", nargs="+", choices=CRITERIA, default=CRITERIA)
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what is simulated (default 1)")
    args = parser.parse_args(argv)
    folder, limits, found = Path(args.checkpoint_dir), criteria.THRESHOLDS, {}
    control = load_model(folder)
    if {"hope_eval", "lyapunov"} & set(args.only):
        held, train = data_of(args, control[0])
    if "hope_eval" in args.only:
        figures = criteria.hope_eval(control, load_model(folder / "recall"), train, held, args.trials)
        found["hope_eval"] = {**figures, "met": figures["score"] >= limits["hope_eval"]}
    if "tool_router" in args.only:
        router = tool_router.ToolRouter.load(folder / "tool_router")
        figures = tool_router.evaluate(router, tool_router.generated_requests(seed=args.seed))
        found["tool_router"] = {**figures, "met": figures["top1"] >= limits["tool_router_top1"]}
    if "lyapunov" in args.only:
        figures = criteria.stability(*control, held)
        found["lyapunov"] = {**figures, "met": figures["ci95"][1] < limits["lyapunov_max"]}
    if "consolidation" in args.only:
        figures = criteria.consolidate(*load_model(folder / "recall"), seed=args.seed)
        found["consolidation"] = {**figures, "met": figures["validated"]}
    print(json.dumps(found, indent=2))
    return 0 if all(figures["met"] for figures in found.values()) else 1


def data_of(args, model):
    """(held-out episodes, the others)."""
    sizes = model.obs_dim, model.output_dim
    if args.rlds_dir:
        data = episodes.load_episodes(args.rlds_dir, *sizes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            simulate.generate(Path(folder), args.episodes, args.seed)
            data = episodes.load_episodes(folder, *sizes)
    return data[::5], [episode for i, episode in enumerate(data) if i % 5]


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
