"""What a rotation buys: parity and arithmetic modulo 5, learned by Mamba-3 and by what lacks a part of it.

Whether the number of ones so far is odd changes with every one that comes in and never fades.  A state that
can only decay cannot hold it; a state that turns by half a circle at every one can.  Mamba-3 (arXiv 2603.15569,
section 3 and table 5) turns its state by an angle that depends on the token.  Here it is trained beside
itself without rotation, with the fixed rotation of RoPE, and beside Mamba-2, on strings whose answer is asked
at the last token only.  Strings start short and grow whenever the model has learned the present length.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import xuracore as xc
from training import optim, schedules
from training.plot import line_chart
from xuracore import io, nn, ops
from xuramamba import Mamba2, Mamba3
from xuravljepa.cli import guard

EPILOG = """\
examples:
  python examples/state_tracking.py                          both tasks, four models: a table and two plots
  python examples/state_tracking.py --task parity --model mamba3 "mamba3 without rotation"
  python examples/state_tracking.py --task parity --steps 400 --max-length 16      a look in half a minute

Accuracy is given as it is and scaled, (accuracy - chance) / (1 - chance), as in the paper.
"""
PADDING, ZERO, ONE = 0, 1, 2  # tokens of parity
PLUS, MINUS, TIMES, EQUALS, DIGIT_0 = 1, 2, 3, 4, 5  # tokens of arithmetic
MODULUS = 5


def parity(rng, count, shortest, longest):
    """Strings of bits and whether they hold an odd number of ones: tokens (count, L), lengths, answers."""
    lengths = rng.integers(shortest, longest + 1, count)
    real = np.arange(lengths.max()) < lengths[:, None]
    bits = rng.integers(0, 2, real.shape) * real
    return np.where(real, bits + ZERO, PADDING), lengths, bits.sum(axis=1) % 2


def arithmetic(rng, count, shortest, longest):
    """Sums, differences and products modulo 5 without brackets, as "3*4-1=": tokens, lengths, answers."""
    numbers = rng.integers((shortest + 1) // 2, longest // 2 + 1, count)
    digits = rng.integers(0, MODULUS, (count, numbers.max()))
    signs = rng.integers(PLUS, TIMES + 1, digits.shape)
    tokens = np.stack([digits + DIGIT_0, signs], axis=-1).reshape(count, -1)
    lengths = 2 * numbers
    tokens[np.arange(count), lengths - 1] = EQUALS
    total, term = np.zeros(count, int), digits[:, 0]
    for i in range(1, digits.shape[1]):  # a product is finished before it is added
        sign, digit, here = signs[:, i - 1], digits[:, i], i < numbers
        adds = here & (sign != TIMES)
        total = np.where(adds, total + term, total)
        started = np.where(sign == MINUS, -digit, digit)
        term = np.where(adds, started, np.where(here, term * digit % MODULUS, term))
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.where(real, tokens, PADDING), lengths, (total + term) % MODULUS


MIXERS = {
    "mamba3": functools.partial(Mamba3, rope="data_dependent"),
    "mamba3 without rotation": functools.partial(Mamba3, rope="none"),
    "mamba3 with standard RoPE": functools.partial(Mamba3, rope="standard"),
    "mamba2": Mamba2,
}
# dt_max = 1: half a turn a token needs a step near 1 (the usual 0.1 gets there, later).
FIELDS = {
    Mamba3: {"d_state": 32, "headdim": 16, "a_activation": "softplus", "dt_max": 1.0},
    Mamba2: {"d_state": 32, "headdim": 16},
}


class Task(NamedTuple):
    """Strings and how they are taught."""

    strings: Callable  # (rng, count, shortest, longest) -> tokens, lengths, answers
    vocabulary: int
    answers: int
    layers: int
    width: int
    steps: int
    batch: int
    longest: int  # strings grow up to here
    learned: float  # running loss below which they grow
    rate: float
    kept_to: int  # length above which the rate falls as 1 / length
    shortest: int


TASKS = {
    "parity": Task(parity, 3, 2, 1, 32, 3000, 64, 64, 0.1, 8e-3, 16, 3),
    "arithmetic": Task(arithmetic, 10, MODULUS, 3, 64, 6000, 128, 40, 0.3, 3e-3, 40, 2),
}


class Tracker(nn.Module):
    """Embedding, residual mixers, and an answer read at the last real token of each string."""

    def __init__(self, task, mixer, *, rng):
        fields = FIELDS[getattr(mixer, "func", mixer)]
        self.embedding = nn.Embedding(task.vocabulary, task.width, rng=rng)
        self.norms = nn.ModuleList([nn.RMSNorm(task.width) for _ in range(task.layers)])
        self.mixers = nn.ModuleList([mixer(task.width, rng=rng, **fields) for _ in range(task.layers)])
        self.norm_f = nn.RMSNorm(task.width)
        self.answer = nn.Linear(task.width, task.answers, rng=rng)

    def forward(self, tokens, lengths):
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))[0]  # padding comes last, where no real token can see it
        return self.answer(self.norm_f(x[np.arange(len(lengths)), lengths - 1]))


def accuracy(model, task, shortest, longest, count, seed):
    """Share of right answers on ``count`` fresh strings of ``shortest`` to ``longest`` tokens."""
    rng, right, rounds = np.random.default_rng([seed, shortest, longest]), 0, -(-count // 128)
    with xc.no_grad():
        for _ in range(rounds):
            tokens, lengths, answers = task.strings(rng, 128, shortest, longest)
            right += int((model(tokens, lengths).numpy().argmax(axis=1) == answers).sum())
    return right / (rounds * 128)


def train(task_name, name, args):
    """Train one model on one task; what came of it, as a dict that JSON can hold."""
    task, longest = TASKS[task_name], longest_of(task_name, args)
    steps, batch = args.steps or TASKS[task_name].steps, args.batch_size or TASKS[task_name].batch
    model = Tracker(task, MIXERS[name], rng=np.random.default_rng(args.seed))
    optimizer = optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.0)
    schedule = schedules.cosine(task.rate, steps, warmup=min(20, steps // 10), final=0.05)
    rng, started = np.random.default_rng([args.seed, 1]), time.monotonic()
    length, running, best, weights = 4.0, 1.0, -1.0, model.state_dict()
    for step in range(1, steps + 1):
        tokens, lengths, answers = task.strings(rng, batch, task.shortest, int(length))
        loss = ops.cross_entropy(model(tokens, lengths), answers)
        loss.backward()
        optim.clip_grad_norm(model.parameters(), 1.0)
        # An error of the angle adds up along the string: the longer it is, the smaller the step.
        optimizer.step(schedule(step - 1) * min(1.0, task.kept_to / length))
        optimizer.zero_grad()
        running += 0.1 * (loss.item() - running)
        if step % 10 == 0 and running < task.learned:
            length = min(longest, 1.1 * length + 0.5)
        if step % 200 == 0 or step == steps:  # like the paper, keep the best of what was validated
            now = accuracy(model, task, task.shortest, longest, 512, seed=args.seed + 1)
            if now >= best:
                best, weights = now, {key: value.copy() for key, value in model.state_dict().items()}
            print(f"{task_name:10s} {name:26s} step {step}/{steps}  strings to {int(length):2d}  loss {running:.3f}  "
                  f"accuracy to {longest}: {now:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.load_state_dict(weights)
    test = functools.partial(accuracy, model, task, count=1024, seed=args.seed + 2)
    ends = sorted({end for end in (4, 6, 8, 12, 16, 24, 32, 40, 64, 96, 128) if end < longest}
                  | {longest, 3 * longest // 2, 2 * longest, 4 * longest})
    return {
        "task": task_name, "model": name, "parameters": sum(p.size for p in model.parameters()),
        "trained_to": int(length), "seconds": round(time.monotonic() - started, 1),
        "accuracy": {
            f"{task.shortest} to {longest}": test(task.shortest, longest),
            f"{longest - 1} to {longest}": test(longest - 1, longest),
            f"{2 * longest - 1} to {2 * longest}": test(2 * longest - 1, 2 * longest),
        },
        "by_length": {str(end): test(max(task.shortest, end - 1), end) for end in ends},
    }  # fmt: skip


def trained(jobs, at_once):
    """The result of every job in order, ``at_once`` of them running at a time."""
    if at_once == 1:
        yield from (train(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    # So small a model gains nothing from a second thread; a second model at the same time does.
    pool = concurrent.futures.ProcessPoolExecutor(at_once, spawn, initializer=xc.set_num_threads, initargs=(1,))
    with pool:
        futures = [pool.submit(train, *job) for job in jobs]
        try:
            yield from (future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def longest_of(task_name, args):
    return args.max_length or TASKS[task_name].longest


def table(results):
    """The results of one task in Markdown."""
    spans = list(results[0]["accuracy"])
    chance = 1 / TASKS[results[0]["task"]].answers
    lines = [f"**{results[0]['task']}** (chance {chance:.0%}; scaled accuracy in brackets)", ""]
    lines += [f"| model | parameters | strings grew to | {' | '.join(f'length {span}' for span in spans)} | seconds |"]
    lines += ["|---|---" + "|---" * (len(spans) + 2) + "|"]
    for result in results:
        cells = [f"{a:.1%} ({(a - chance) / (1 - chance):+.2f})" for a in result["accuracy"].values()]
        lines.append(f"| {result['model']} | {result['parameters']} | {result['trained_to']} | {' | '.join(cells)} | "
                     f"{result['seconds']:.0f} |")
    return "\n".join(lines)


def write(results, args):
    """results.json, table.md and one plot a task, of all that has been trained so far."""
    args.output.mkdir(parents=True, exist_ok=True)
    io.save_json(args.output / "results.json", {"seed": args.seed, "results": results})
    tables = []
    for task in dict.fromkeys(result["task"] for result in results):
        these = [result for result in results if result["task"] == task]
        tables.append(table(these))
        curves = {r["model"]: ([int(end) for end in r["by_length"]], list(r["by_length"].values())) for r in these}
        chart = line_chart(
            curves, title=f"{task}: trained on strings of up to {longest_of(task, args)} tokens",
            x_label="length of the string", y_label="accuracy", y_range=(0, 1), log_x=True, size=(840, 400),
        )  # fmt: skip
        (args.output / f"{task}.svg").write_text(chart, encoding="utf-8")
    (args.output / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    return "\n\n".join(tables)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--model", nargs="+", choices=MIXERS, default=list(MIXERS), metavar="NAME",
                        help=f"default: all of {', '.join(map(repr, MIXERS))}")
    parser.add_argument("--steps", type=int, help="training steps of each model (default: 3000; arithmetic 6000)")
    parser.add_argument("--batch-size", type=int, help="strings a step (default: 64; arithmetic 128)")
    parser.add_argument("--max-length", type=int, help="strings grow up to here (default: 64; arithmetic 40)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time (default 2)")
    parser.add_argument("--output", type=Path, default=Path("xura-state-tracking"), metavar="DIR",
                        help="where the table, the plots and results.json go (default ./xura-state-tracking)")
    args = parser.parse_args(argv)
    given = [n for n in (args.steps, args.batch_size, args.jobs) if n is not None]
    if min(given) < 1 or (args.max_length is not None and args.max_length < 8):
        parser.error("--steps, --batch-size and --jobs are at least 1, --max-length at least 8")

    started, results = time.monotonic(), []
    for result in trained([(task, name, args) for task in args.task for name in args.model], args.jobs):
        results.append(result)
        write(results, args)  # what is done stays when the rest is interrupted
    print(f"\n{write(results, args)}\n\nwritten to {args.output} after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
