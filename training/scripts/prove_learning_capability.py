"""Prove that WaveCore learns: train the seed on episodes and on delayed recall, measure, write the verdict."""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import positive, run_script
from training.wavecore.proof import prove

EPILOG = """\
Writes wavecore_seed.npz, manifest.json, config.json and proof_of_learning.json to --checkpoint-dir, the model of
delayed recall to recall/ and the tool router to tool_router/ in it.  The exit code is 0 for a proof, 1 for none.

example:
  python training/scripts/prove_learning_capability.py --checkpoint-dir runs/core_model_seed
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", default="runs/core_model_seed", metavar="DIR")
    parser.add_argument("--rlds-dir", metavar="DIR", help="episodes of your own, 64 observed numbers, 7 commanded")
    parser.add_argument("--episodes", type=positive, default=640, metavar="N", help="to simulate (default 640)")
    parser.add_argument("--steps", type=positive, default=2400, metavar="N", help="of control (default 2400)")
    parser.add_argument("--recall-steps", type=positive, default=420, metavar="N", help="default 420")
    parser.add_argument("--recall-lag", type=positive, default=110, metavar="N", help="longest (default 110)")
    parser.add_argument("--trials", type=positive, default=256, metavar="N", help="of each measured lag (default 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of control (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args(argv)
    begun = time.perf_counter()

    def say(text):
        if not args.quiet:
            print(f"{time.perf_counter() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    proof = prove(args.checkpoint_dir, seed=args.seed, rlds_dir=args.rlds_dir, count=args.episodes, steps=args.steps,
                  recall_steps=args.recall_steps, recall_lag=args.recall_lag, trials=args.trials, lr=args.lr, say=say)
    shown = {name: proof[name] for name in ("verdict", "checks", "baseline", "trained", "cms", "stability", "ablations",
                                            "hope_eval", "tool_router", "consolidation")}
    print(json.dumps(shown, indent=2))
    return 0 if proof["verdict"] == "pass" else 1


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
