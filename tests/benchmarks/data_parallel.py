"""Phase 1 on one process with batch 2B beside two MPI processes with batch B: the loss curves, and samples a second.

    python tests/benchmarks/data_parallel.py --steps 30 --rounds 3

Every process has one thread.  Both train the tiny preset on generated scenes, one after the other in each round, and
see the same samples in the same steps; so the curves are equal but for rounding.  Samples are questions; the rate is
the median over the steps of all rounds, beside that of the fastest tenth.  Needs the extra 'mpi' and an mpirun.
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


def command(args, ranks, folder):
    """The words of a training whose whole batch is always the same."""
    launcher = [*shlex.split(args.mpirun), "-n", str(ranks)] if ranks > 1 else []
    words = ["--scenes", args.scenes, "--steps", args.steps, "--batch-size", args.batch_size * args.ranks // ranks,
             "--turns", args.turns, "--lesson", 0, "--wordings", "plain", "--log-every", 1, "--output-dir", folder,
             "--quiet", "--threads", 1]
    return [*launcher, sys.executable, str(ROOT / "training/scripts/train_jepa.py"), *map(str, words)]


def train(args, ranks, folder):
    """The training records of the run's metrics.jsonl."""
    allowed = {f"{name}_ALLOW_RUN_AS_ROOT{more}": "1" for name in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}
    environment = {**os.environ, **allowed, "OPENBLAS_NUM_THREADS": "1", "XURA_NUM_THREADS": "1"}
    done = subprocess.run(command(args, ranks, folder), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run on {ranks} ranks failed:\n{done.stderr}")
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == "train"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="of each of them (default 16)")
    parser.add_argument("--turns", type=int, default=8, metavar="N", help="questions per picture (default 8)")
    parser.add_argument("--scenes", type=int, default=60, metavar="N")
    parser.add_argument("--steps", type=int, default=30, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--mpirun", default="mpirun", metavar="COMMAND", help="with its options, as one word")
    args = parser.parse_args()
    if not find_spec("mpi4py") or not which(shlex.split(args.mpirun)[0]):
        raise SystemExit("needs mpi4py and mpirun: pip install 'xura[mpi]', and an MPI (--mpirun names its launcher)")
    found = {1: [], args.ranks: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for ranks in found:
                found[ranks].append(train(args, ranks, f"{folder}/{ranks}-{number}"))
    report(args, found)


def report(args, found):
    one, many = found[1][0], found[args.ranks][0]
    print(f"| step | 1 rank, batch {args.batch_size * args.ranks} | {args.ranks} ranks, batch {args.batch_size} each | "
          "relative difference |\n|---|---|---|---|")
    off = [abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, many)]
    for i in sorted({0, 1, 2, 4, 9, 19, 49, 99, args.steps - 1} & set(range(args.steps))):
        print(f"| {i + 1} | {one[i]['loss']:.6f} | {many[i]['loss']:.6f} | {off[i]:.1e} |")
    print(f"\nLargest relative difference over {args.steps} steps: {max(off):.1e}\n")
    print("| | samples/s, median | fastest tenth | times one rank | peak memory of rank 0 |\n|---|---|---|---|---|")
    rates = {ranks: sorted(record["samples_per_second"] for run in runs for record in run[FIRST:])
             for ranks, runs in found.items()}
    middle = {ranks: statistics.median(some) for ranks, some in rates.items()}
    best = {ranks: some[-max(1, len(some) // 10)] for ranks, some in rates.items()}
    for ranks, runs in found.items():
        ratios = f"{middle[ranks] / middle[1]:.2f}× / {best[ranks] / best[1]:.2f}×"
        peak = max(record["peak_mb"] for run in runs for record in run)
        print(f"| {ranks} rank{'s' * (ranks > 1)} | {middle[ranks]:.0f} | {best[ranks]:.0f} | {ratios} | {peak} MB |")


if __name__ == "__main__":
    main()
