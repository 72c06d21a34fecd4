"""Train WaveCore in its fast, mid and slow loops, save it, and export it: the result is JSON."""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training.options import run_script
from training.wavecore import loops
from xuracore.io.strict_json import parse_json


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="runs/wavecore_loops", metavar="DIR")
    parser.add_argument("--payload", default="{}", metavar="JSON",
                        help='settings by loop, such as {"fast": {"max_steps": 24}, "quantization": "int8"}')
    args = parser.parse_args(argv)
    print(json.dumps(loops.run(parse_json(args.payload.encode()), args.output_dir), indent=2))
    return 0


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
