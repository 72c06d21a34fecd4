"""Measure whether an agent knows when it is wrong, in domain and under shifts, beside simpler judges."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import options, risk, risk_page
from xuracore import io, set_num_threads
from xuracore.errors import ConfigError, FormatError
from xuravljepa.agent.agent import Agent

EPILOG = """\
In domain: test pictures and tool questions before any call.  Shifted: noise, blur, occlusion, held-out colour ×
shape pairs, unseen wordings, and changes of the picture that no training shows.

examples:
  python training/scripts/risk.py --html risk.html --json risk.json
  python training/scripts/risk.py --model runs/agent/model --scenes 100
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="DIR", help="folder of a model, or 'tiny' (default)")
    parser.add_argument("--scenes", type=options.positive, default=300, metavar="N",
                        help="corrupted pictures; the other sets are in proportion (default 300)")
    parser.add_argument("--resamples", type=options.positive, default=200, metavar="N",
                        help="of the bootstrap (default 200)")
    parser.add_argument("--data-seed", type=int, default=0, metavar="N")
    parser.add_argument("--html", metavar="FILE", help="write a page with curves and tables")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--threads", type=options.positive, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args(argv)
    for file in (args.json, args.html):
        if file and not Path(file).resolve().parent.is_dir():
            raise FormatError("there is no such folder to write into", Path(file).parent)
    if args.threads:
        set_num_threads(args.threads)
    agent = Agent.from_pretrained(args.model)
    if not agent.trained:
        raise ConfigError(f"{args.model} has no trained heads: run train_agent.py on it first")
    found = risk.risk_report(agent.model, agent.heads, args.scenes, args.data_seed, args.resamples,
                             lambda name: options.counter(args, f"questions read ({name})"))
    print(risk.table(found))
    if args.json:
        io.save_json(Path(args.json), found)
    if args.html:
        risk_page.write_page(args.html, found, f"Model {args.model}, generated scenes with seed {args.data_seed}: "
                             "none of these pictures and keys was seen in any training.")
        options.say(args, f"page: {args.html}")
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
