"""What the engine says about itself and about your program.

doctor   what it finds here: versions, processor, threads, BLAS, kernels and their cache
warmup   compile the kernels ahead of time
bench    small ops, a training step, kernels and bandwidth beside plain NumPy, in twenty seconds
profile  run a script and draw where its time and memory went
ops      the table of all ops
"""

import argparse
import contextlib
import importlib
import os
import runpy
import sys
import time
from pathlib import Path

import numpy as np

from xuracore import bench, doctor, jit, threads, warmup
from xuracore.errors import ConfigError, XuraError
from xuracore.ops.table import op_table
from xuracore.profiler import profile


def main(arguments=None):
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m xuracore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print versions, processor, threads, BLAS, kernels and their cache")
    warming = commands.add_parser("warmup", help="compile all kernels for float32 and print the time of each")
    warming.add_argument("--clear", action="store_true", help="remove what the cache holds of them first")
    timing = commands.add_parser("bench", help="time the engine beside plain NumPy")
    timing.add_argument("--seconds", type=float, default=1.0, help="of each row (default: %(default)s)")
    commands.add_parser("ops", help="print the table of all ops, in Markdown")
    profiling = commands.add_parser("profile", help="draw where the time and memory of a program went")
    profiling.add_argument("--out", default="profile.html", help="the page to write (default: %(default)s)")
    profiling.add_argument("--trace", help="also write a trace for chrome://tracing or ui.perfetto.dev")
    profiling.add_argument("--rows", type=int, default=20, help="ops in the printed table (default: %(default)s)")
    profiling.add_argument(
        "target", nargs="?",
        help="script.py, or package.module:function, called without arguments; left out: a small training run",
    )  # fmt: skip
    profiling.add_argument("arguments", nargs=argparse.REMAINDER, help="for the script")
    options = parser.parse_args(arguments)
    try:
        return {
            "doctor": print_doctor,
            "warmup": lambda: print_warmup(options.clear),
            "bench": lambda: bench.print_table(options.seconds),
            "ops": print_ops,
            "profile": lambda: write_profile(options),
        }[options.command]()
    except XuraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def print_ops():
    """Print every registered op; returns 0."""
    print(op_table())
    return 0


def write_profile(options):
    """Run the target under a profile; write the page and print the table; returns the target's exit status."""
    name, run = _target(options.target, options.arguments)
    status = 0
    with profile(name=name) as found:
        try:
            run()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    if not found.events:
        print(f"error: {name} called no op of the engine", file=sys.stderr)
        return status or 1
    print(found.table(options.rows))
    found.page(options.out)
    print(f"\nthe picture: {options.out}")
    if options.trace:
        found.chrome_trace(options.trace)
        print(f"the trace: {options.trace}")
    return status


def _target(target, arguments):
    """(name, function without arguments) of what to run."""
    if target is None:
        return "training steps", _small_training_run()
    module, colon, function = target.partition(":")
    if colon and not target.endswith(".py"):
        with _path_first(os.getcwd()):
            try:
                return target, getattr(importlib.import_module(module), function)
            except (ImportError, AttributeError) as error:
                raise ConfigError(f"{target}: {error}") from None
    if not Path(target).is_file():
        raise ConfigError(f"{target} is neither a script nor package.module:function")

    def run():
        before = sys.argv
        sys.argv = [target, *arguments]
        try:
            with _path_first(str(Path(target).resolve().parent)):
                runpy.run_path(target, run_name="__main__")
        finally:
            sys.argv = before

    return Path(target).name, run


@contextlib.contextmanager
def _path_first(folder):
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _small_training_run():
    rng = np.random.default_rng(0)
    step = bench.training_step(bench.Network(rng=rng), *bench.digits(rng))
    step()  # compiles

    def run():
        for _ in range(3):
            step()

    return run


def print_doctor():
    """Print what :func:`xuracore.doctor.examine` finds; returns 0."""
    facts, notes = doctor.examine()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")
    for note in notes:
        print(f"{'note':{width}}  {note}")
    return 0


def print_warmup(clear=False):
    """Compile all kernels and print the milliseconds of each; returns 0."""
    if jit.backend() != "numba":
        print("nothing to compile: the kernels run as they are (see python -m xuracore doctor)")
        return 0
    if clear:
        print(f"removed {warmup.clear()} files from {jit.cache_directory()}")
    start, builds = time.perf_counter(), []

    def report(first_call):
        builds.append(first_call)
        name, how, taken = first_call
        print(f"{taken * 1000:8.0f} ms  {name} ({how})", flush=True)

    try:
        warmup.warm_up(report, threads.get_num_threads())
    except KeyboardInterrupt:
        print(f"stopped after {len(builds)} builds, which are kept: run it again to go on", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    print(f"{seconds * 1000:8.0f} ms  in all, {len(builds)} builds; cache: {jit.cache_directory()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
