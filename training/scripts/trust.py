"""Measure whether an agent can be trusted with its tools, its memory and a long talk."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import options, trust
from xuracore import io, set_num_threads
from xuracore.errors import ConfigError
from xuravljepa.agent.agent import Agent, load_heads

EPILOG = """\
parts:
  tools     known and unseen keys, gated by doubt, beside never, always and an oracle; harm
  liar      a price list that lies, before and after an audit by control questions
  memory    questions about what was seen earlier
  session   many questions from one look: accuracy by turn
  modes     ways to take in a result; give the others with --heads

examples:
  python training/scripts/trust.py
  python training/scripts/trust.py --only modes --heads runs/residual runs/offset runs/token
"""
PARTS = ("tools", "liar", "memory", "session", "modes")


def lines(name, value, indent=""):
    """Nested numbers as aligned lines of text."""
    if isinstance(value, dict):
        yield f"{indent}{name}"
        for key, inner in value.items():
            yield from lines(key, inner, indent + "  ")
        return
    numbers = value if isinstance(value, list) else [value]
    shown = "  ".join(f"{number:.4f}" if isinstance(number, float) else str(number) for number in numbers)
    yield f"{indent}{name:24s} {shown}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="DIR", help="folder of a model, or 'tiny' (default)")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="some parts instead of all")
    parser.add_argument("--scenes", type=options.positive, default=200, metavar="N", help="test scenes (default 200)")
    parser.add_argument("--data-seed", type=int, default=0, metavar="N")
    parser.add_argument("--heads", nargs="+", default=[], metavar="DIR",
                        help="heads to compare the modes with, of runs of train_agent.py --stage injection")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--threads", type=options.positive, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    if args.threads:
        set_num_threads(args.threads)
    agent = Agent.from_pretrained(args.model)
    if not agent.trained or "lookup" not in agent.tools:
        raise ConfigError(f"{args.model} has no trained heads with a price list: run train_agent.py on it first")
    wanted, seed, result = args.only or PARTS, args.data_seed, {}

    def report(part):
        return options.counter(args, f"{part}: asked")

    if "tools" in wanted:
        result["tools"] = trust.tool_report(agent, args.scenes, seed, report("tools"))
    if "liar" in wanted:
        result["liar"] = trust.liar_report(agent, args.scenes, seed=seed, report=report("liar"))
    if "memory" in wanted:
        result["memory"] = trust.memory_report(agent, max(args.scenes // 3, 1), seed, report("memory"))
    if "session" in wanted:
        result["session"] = trust.session_report(agent, max(args.scenes // 4, 1), seed=seed, report=report("session"))
    if "modes" in wanted:
        heads = {"as shipped": agent.heads}
        for folder in args.heads:
            other = load_heads(agent.model, folder)
            heads[other.config.injector.mode] = other
        result["modes"] = trust.modes_report(agent.model, heads, args.scenes, seed)
    for name, part in result.items():
        print("\n".join(lines(name, part)))
    if args.json:
        io.save_json(Path(args.json), result)
    agent.tools.close()
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
