"""``python -m xuracore doctor`` says what the engine finds here; ``warmup`` compiles the kernels ahead."""

import argparse
import sys
import time

from xuracore import doctor, jit, warmup
from xuracore.errors import XuraError


def main(arguments=None):
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m xuracore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, processor, threads, BLAS, kernels and their cache")
    commands.add_parser("warmup", help="compile all kernels for float32 into the cache; print what each took")
    command = parser.parse_args(arguments).command
    try:
        return print_doctor() if command == "doctor" else print_warmup()
    except XuraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def print_doctor():
    """Print what :func:`xuracore.doctor.examine` finds; returns 0."""
    facts, notes = doctor.examine()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")
    for note in notes:
        print(f"{'note':{width}}  {note}")
    return 0


def print_warmup():
    """Compile all kernels and print the milliseconds of each; returns 0."""
    start = time.perf_counter()
    first_calls = warmup.warm_up()
    seconds = time.perf_counter() - start
    if jit.backend() == "numpy":
        print("nothing to compile: the kernels run as NumPy (see python -m xuracore doctor)")
        return 0
    for name, build, taken in first_calls:
        print(f"{taken * 1000:8.0f} ms  {name} ({build})")
    print(f"{seconds * 1000:8.0f} ms  in all, {len(first_calls)} builds; cache: {jit.cache_directory()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
