"""Time a saved WaveCore model step by step: python -m xuramamba.wavecore.inference_router --model-path DIR."""

import argparse
import json
import sys

from xuracore.errors import ShapeError, XuraError
from xuramamba.wavecore.session import InferenceRouter


def main(argv=None):
    """Print backend, whether it was to be had, and milliseconds of a step, as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, metavar="DIR", help="a checkpoint or an export")
    parser.add_argument("--backend", default="auto", choices=("auto", "numba", "numpy", "hailo", "tpu", "gpu", "cpu"))
    parser.add_argument("--obs-dim", type=int, metavar="N", help="checked against the model, if given")
    parser.add_argument("--action-dim", type=int, metavar="N", help="checked against the model, if given")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    args = parser.parse_args(argv)
    try:
        router = InferenceRouter.from_pretrained(args.model_path, args.backend)
        for name in ("obs_dim", "action_dim"):
            given, own = getattr(args, name), getattr(router.model, name)
            if given not in (None, own):
                raise ShapeError(f"--{name.replace('_', '-')} {given}: the model has {own}")
        print(json.dumps(router.latency(max(1, args.steps))))
    except (XuraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
