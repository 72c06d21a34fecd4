"""The tool router: train it on requests, ask it for a tool, grade it on requests it has never seen."""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import positive, run_script
from training.wavecore import tool_router


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on requests, and grade on the held-out ones")
    train.add_argument("--output-dir", default="runs/tool_router", metavar="DIR")
    train.add_argument("--steps", type=positive, default=600, metavar="N")
    train.add_argument("--batch-size", type=positive, default=64, metavar="N")
    train.add_argument("--learning-rate", type=float, default=3e-3)
    infer = commands.add_parser("infer", help="the likeliest tools of a request")
    infer.add_argument("text")
    infer.add_argument("--count", type=positive, default=5, metavar="N")
    grade = commands.add_parser("eval", help="top-1 and top-5 on the held-out requests")
    for command in (infer, grade):
        command.add_argument("--model-path", default="runs/tool_router", metavar="DIR")
    for command in (train, grade):
        command.add_argument("--rlds-dir", metavar="DIR", help="episodes with plans and tool calls")
        command.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    if args.command == "infer":
        router = tool_router.ToolRouter.load(args.model_path)
        found = router.infer(args.text, args.count)
        print(json.dumps([{"tool": tool, "probability": round(p, 4)} for tool, p in found]))
        return 0
    if args.rlds_dir:
        pairs = tool_router.read_requests(args.rlds_dir)
    else:
        pairs = tool_router.generated_requests(seed=args.seed)
    if args.command == "train":
        router = tool_router.train(pairs, steps=args.steps, batch=args.batch_size, lr=args.learning_rate,
                                   seed=args.seed)
        router.save(args.output_dir)
    else:
        router = tool_router.ToolRouter.load(args.model_path)
    print(json.dumps(tool_router.evaluate(router, pairs)))
    return 0


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
