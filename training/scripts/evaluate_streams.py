"""Measure how many decodes the selective decoder saves on generated streams, with a model's real embeddings."""

import argparse
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import streams
from training.options import positive, run_script
from training.plot import line_chart
from xuracore import io
from xuravljepa.agent.selective import SelectiveConfig
from xuravljepa.model import VLJEPA

EPILOG = """\
A stream is a scene in which now and then an object appears, disappears or moves.  Each frame is asked five counting
questions, one at a time and all together; a rule says which frames are put into words.  Accuracy is the share of the
frames whose standing answers are right.  The last column says how many times fewer decodes a rule needs than uniform
sampling of the same accuracy (live rules: single frames or means of four, every 1 to 60 frames; offline rules: means
of windows), over the seeds from the least to the most; with > where uniform sampling is less accurate at every rate.

examples:
  python training/scripts/evaluate_streams.py
  python training/scripts/evaluate_streams.py --model runs/agent/model --noise 4 --seeds 2 --streams 2
"""
PERIODS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 60)
SHOWN = (1, 2, 5, 10, 20, 30)
DRIFTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # for one question; of k together one change counts 1/k as much
RATES = (0.02, 0.03, 0.05, 0.1)
MOVES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
PRICES = (0.5, 1.0, 2.0, 4.0, 8.0)


def rules(questions):
    """{family: ({label: rule}, offline)} for so many questions; a rule is a function from a Watched to its decodes."""
    def online(**settings):
        return lambda watched: streams.online(watched, SelectiveConfig(**settings))

    usual = SelectiveConfig().drift
    drifts = {f"online, drift {d:.2g}" + " (default)" * (d == usual): online(drift=d)
              for d in (drift / questions for drift in DRIFTS)}  # fmt: skip
    rates = {f"online, rate {100 * rate:g} in 100": online(drift=usual / questions, target_rate=rate)
             for rate in RATES}  # fmt: skip
    return {
        "uniform": ({f"every {n}": lambda w, n=n: streams.uniform(w, n) for n in PERIODS}, False),
        "uniform, mean of 4": ({f"every {n}, mean of 4": lambda w, n=n: streams.uniform(w, n, 4) for n in PERIODS},
                               False),
        "L2 to 8 frames ago": ({f"L2 over {t:g}": lambda w, t=t: streams.moved_since(w, t) for t in MOVES}, False),
        "online": (drifts, False),
        "online, rate kept": (rates, False),
        "windows (offline)": ({f"windows of {n}": lambda w, n=n: streams.windows(w, n) for n in PERIODS}, True),
        "Ward (offline)": ({f"Ward, merges up to {t:g}": lambda w, t=t: streams.ward(w, threshold=t) for t in PRICES}
                           | {"Ward, true number": lambda w: streams.ward(w, count=len(w.changes) + 1)}, True),
    }  # fmt: skip


def measure(by_seed, questions):
    """{family: {label: (Worth of all seeds, [(factor, reached) of each seed])}}."""
    found = {}
    for family, (members, offline) in rules(questions).items():
        found[family] = {label: [streams.total(watched, rule, offline) for watched in by_seed]
                         for label, rule in members.items()}
    live = [*found["uniform"].values(), *found["uniform, mean of 4"].values()]
    result = {}
    for family, members in found.items():
        base = found["windows (offline)"].values() if "offline" in family else live
        result[family] = {
            label: (sum(worths, start=streams.Worth()),
                    [streams.saved(one, [other[seed] for other in base]) for seed, one in enumerate(worths)])
            for label, worths in members.items()
        }
    return result


def table(found):
    """Markdown of what ``measure`` found."""
    lines = ["| rule | decodes per 100 frames | accuracy | boundary F1 | latency, frames | fewer decodes |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for family, members in found.items():
        for label, (worth, savings) in members.items():
            if label.startswith(("every", "windows")) and not any(
                    label.split(",")[0].endswith(f" {n}") for n in SHOWN):
                continue
            latency = "" if "offline" in family else f"{worth.latency:.1f}"
            factor = "" if family.startswith(("uniform", "windows")) else _factor(savings)
            lines.append(f"| {label} | {worth.rate:.1f} | {worth.accuracy:.3f} | {worth.boundary_f1:.2f} | {latency} | "
                         f"{factor} |")
    return "\n".join(lines)


def _factor(savings):
    least, most = min(savings), max(savings)
    texts = [f"{'' if reached else '> '}{factor:.1f}" for factor, reached in (least, most)]
    return " to ".join(dict.fromkeys(texts)) + " ×"


def chart(found, title):
    """SVG of accuracy over decodes."""
    series = {}
    for family, members in found.items():
        points = sorted((worth.rate, worth.accuracy) for label, (worth, _) in members.items() if "true" not in label)
        series[family] = tuple(zip(*points))
    return line_chart(series, title=title, x_label="decodes per 100 frames", y_label="accuracy", log_x=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="DIR", help="folder of a model, or tiny (default)")
    parser.add_argument("--noise", type=float, nargs="+", default=(4, 16, 32), metavar="SIGMA",
                        help="standard deviations of the camera noise, of 255 (default 4 16 32)")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="data seeds 0 to N - 1 (default 5)")
    parser.add_argument("--streams", type=positive, default=4, metavar="N", help="for each seed (default 4)")
    parser.add_argument("--length", type=positive, default=120, metavar="FRAMES", help="default 120")
    parser.add_argument("--output-dir", default="runs/streams", metavar="DIR", help="default runs/streams")
    args = parser.parse_args(argv)
    model, folder, numbers = VLJEPA.from_pretrained(args.model), Path(args.output_dir), {}
    folder.mkdir(parents=True, exist_ok=True)
    for noise in args.noise:
        seen = [[streams.watch(model, "test", index, seed, args.length, noise) for index in range(args.streams)]
                for seed in range(args.seeds)]  # fmt: skip
        kinds = {"one question at a time": [[one for this in seed for one in this[:-1]] for seed in seen],
                 "five questions at once": [[this[-1] for this in seed] for seed in seen]}
        for number, (kind, by_seed) in enumerate(kinds.items()):
            found = measure(by_seed, by_seed[0][0].right.shape[1])
            worth = found["uniform"]["every 1"][0]
            title = f"{kind}, noise {noise:g}"
            print(f"\n{title[0].upper()}{title[1:]}: {worth.frames:,} frames, {100 * worth.changes / worth.frames:.1f} "
                  f"changes per 100\n\n{table(found)}", flush=True)
            picture = folder / f"streams_{('one', 'five')[number]}_noise{noise:g}.svg"
            picture.write_text(chart(found, f"Selective decoding: {title}"), encoding="utf-8")
            numbers[title] = {label: {"rate": w.rate, "accuracy": w.accuracy, "f1": w.boundary_f1, "latency": w.latency,
                                      "fewer": [float(np.round(factor, 3)) for factor, _ in savings]}
                              for members in found.values() for label, (w, savings) in members.items()}  # fmt: skip
    io.save_json(folder / "streams.json", numbers)
    return 0


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
