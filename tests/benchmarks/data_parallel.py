"""Phase 1 on one process with batch 2B beside two MPI processes with batch B: the loss curves, and samples a second.

    python tests/benchmarks/data_parallel.py --steps 30 --rounds 3

Every process has one thread.  Both train the tiny preset on generated scenes, one after the other in each round, and
see the same samples in the same steps; so the curves are equal but for rounding.  Samples are questions; the rate is
the median over the steps of all rounds, beside that of the fastest tenth.  A third run is of as many processes at the
same time that do not know of each other, each with batch B: their rates together are what the machine has to give.
Needs the extra 'mpi' and an mpirun.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]
FIRST = 3  # steps that also load and compile


def command(args, ranks, batch, folder):
    """The words of a training."""
    launcher = [*shlex.split(args.mpirun), "-n", str(ranks)] if ranks > 1 else []
    words = ["--scenes", args.scenes, "--steps", args.steps, "--batch-size", batch, "--turns", args.turns,
             "--lesson", 0, "--wordings", args.wordings, "--log-every", 1, "--output-dir", folder,
             "--quiet", "--threads", 1]
    return [*launcher, sys.executable, str(ROOT / "training/scripts/train_jepa.py"), *map(str, words)]


def train(args, folders, ranks, batch):
    """Train into all ``folders`` at the same time; the training records of each run's metrics.jsonl."""
    allowed = {f"{name}_ALLOW_RUN_AS_ROOT{more}": "1" for name in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    environment = {**os.environ, **allowed, "OPENBLAS_NUM_THREADS": "1", "XURA_NUM_THREADS": "1"}
    runs = [subprocess.Popen(command(args, ranks, batch, folder), env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for folder in folders]
    told = [run.communicate()[1] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit(f"a run on {ranks} ranks failed:\n" + "\n".join(told))
    logs = [[json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
            for folder in folders]
    return [[record for record in records if record["split"] == "train"] for records in logs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="of each of them (default 16)")
    parser.add_argument("--turns", type=int, default=8, metavar="N", help="questions per picture (default 8)")
    parser.add_argument("--wordings", choices=("plain", "wide"), default="wide", help="wide: captions too (default)")
    parser.add_argument("--scenes", type=int, default=60, metavar="N")
    parser.add_argument("--steps", type=int, default=30, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--mpirun", default="mpirun", metavar="COMMAND", help="with its options, as one word")
    args = parser.parse_args()
    if not find_spec("mpi4py") or not which(shlex.split(args.mpirun)[0]):
        raise SystemExit("needs mpi4py and mpirun: pip install 'xura[mpi]', and an MPI (--mpirun names its launcher)")
    one, many = f"1 rank, batch {args.batch_size * args.ranks}", f"{args.ranks} ranks, batch {args.batch_size} each"
    apart = f"{args.ranks} runs apart, batch {args.batch_size} each"
    cases = {one: (1, 1, args.batch_size * args.ranks), many: (1, args.ranks, args.batch_size),
             apart: (args.ranks, 1, args.batch_size)}
    found = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for case, (name, (runs, ranks, batch)) in enumerate(cases.items()):
                folders = [f"{folder}/{number}-{case}-{run}" for run in range(runs)]
                found[name].append(train(args, folders, ranks, batch))
    report_curves(args, {name: found[name][0][0] for name in (one, many)})
    report_rates(found)


def report_curves(args, curves):
    """Print the losses of two runs at some steps, and how far apart they are at most."""
    one, many = curves.values()
    off = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, many)]
    print("| step | " + " | ".join(curves) + " | relative difference |\n|---|---|---|---|")
    for i in sorted({0, 1, 2, 4, 9, 19, 49, 99, args.steps - 1} & set(range(args.steps))):
        print(f"| {i + 1} | {one[i]['loss']:.6f} | {many[i]['loss']:.6f} | {off[i]:.1e} |")
    print(f"\nLargest relative difference over {args.steps} steps: {max(off):.1e}\n")


def report_rates(found):
    """Print the samples a second of each case; runs at the same time are added up, step by step."""
    print("| | samples/s, median | fastest tenth | times one rank | peak memory of a process |\n|---|---|---|---|---|")
    first = None
    for name, rounds in found.items():
        rates = sorted(sum(record["samples_per_second"] for record in step)
                       for runs in rounds for step in zip(*(run[FIRST:] for run in runs)))
        middle, best = statistics.median(rates), rates[-max(1, len(rates) // 10)]
        first = first or (middle, best)
        peak = max(record["peak_mb"] for runs in rounds for run in runs for record in run)
        print(f"| {name} | {middle:.0f} | {best:.0f} | {middle / first[0]:.2f}× / {best / first[1]:.2f}× | {peak} MB |")


if __name__ == "__main__":
    main()
