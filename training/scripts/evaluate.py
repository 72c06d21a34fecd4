"""Measure a model and its agent on held-out generated scenes, beside priors and controls."""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import evaluate, options
from xuracore import io, set_num_threads
from xuravljepa.agent.agent import Agent, load_heads

EPILOG = """\
examples:
  python training/scripts/evaluate.py                                the shipped model
  python training/scripts/evaluate.py --model runs/tiny/agent/model --json result.json
"""
COLUMNS = ("test", "prior", "shuffled", "paraphrase", "ood", "corrupt")


def scene_table(report):
    """Lines of text: a row per question type, its accuracy beside every control, in percent."""
    order = ["non-relational", "relational"] + [name for name in report if "relational" not in name]
    lines = ["question type      questions " + "".join(f"{name:>11s}" for name in COLUMNS)]
    for name in order:
        cells = "".join(f"{100 * report[name][c][0]:11.1f}" if c in report[name] else " " * 11 for c in COLUMNS)
        lines.append(f"{name:18s} {report[name]['test'][1]:9d} {cells}")
    return "\n".join(lines)


def dict_table(report, indent=""):
    """Nested numbers as aligned lines."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", dict_table(value, indent + "  ")]
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            lines.append(f"{indent}{name:32s} {shown}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="DIR", help="folder of a model, or 'tiny' (default)")
    parser.add_argument("--scenes", type=options.positive, default=600, metavar="N", help="test scenes (default 600)")
    parser.add_argument("--data-seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", choices=("scenes", "doubt", "tools", "injection"), help="one part instead of all")
    parser.add_argument("--heads", metavar="DIR", help="other heads to compare the injection with, from a run of "
                        "train_agent.py --injection-mode residual or --stage injection")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--threads", type=options.positive, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if args.threads:
        set_num_threads(args.threads)
    agent = Agent.from_pretrained(args.model)
    seed, result = args.data_seed, {}
    wanted = (args.only,) if args.only else ("scenes", "doubt", "tools", "injection")
    if "scenes" in wanted:
        result["scenes"] = evaluate.scene_report(agent.model, args.scenes, seed)
        print(f"Answers from pixels, percent right\n{scene_table(result['scenes'])}\n")
    if agent.trained and "doubt" in wanted:
        result["doubt"] = evaluate.doubt_report(agent.model, agent.heads, args.scenes, seed)
        print(f"Knowing when it is wrong\n{dict_table(result['doubt'], '  ')}\n")
    if agent.trained and len(agent.tools) and "tools" in wanted:
        result["tools"] = evaluate.tool_report(agent, max(args.scenes // 2, 1), seed,
                                               options.counter(args, "tool questions asked"))
        print(f"Questions that need a tool\n{dict_table(result['tools'], '  ')}\n")
    if agent.trained and agent.heads.config.cards and "injection" in wanted:
        result["injection"] = evaluate.injection_report(agent.model, agent.heads, max(args.scenes // 3, 1), seed)
        print(f"Taking in what a tool said\n{dict_table(result['injection'], '  ')}\n")
        if args.heads:
            other = load_heads(agent.model, args.heads)
            result["compared"] = evaluate.injection_report(agent.model, other, max(args.scenes // 3, 1), seed)
            print(f"The same with {args.heads}\n{dict_table(result['compared'], '  ')}\n")
    if args.json:
        io.save_json(Path(args.json), result)
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
