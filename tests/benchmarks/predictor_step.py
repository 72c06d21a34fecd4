"""A training step of the predictor against the same model in torch:  forward, loss, backward, clip, AdamW.

    python tests/benchmarks/predictor_step.py --peer-python PYTHON_WITH_TORCH

Batches are those of ``train_jepa.py``: questions about generated scenes, several turns a picture, padded; visual
tokens are drawn, since the frozen X-Encoder is no part of a step.  The peer (predictor_torch.py) is written with
torch's own layers and batched products, one chunk of 64 tokens at a time over whole padded batches, with torch's
fused AdamW.  Both sides start from the same weights; before anything is timed, loss and gradients of the first batch
are compared, and a difference of more than 1e-3 of a gradient's norm ends the run.

Each side lives in a process of its own, and they take turns.  Peak memory is that of the whole process (ru_maxrss):
interpreter, libraries, model, optimizer and step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

# pictures a batch; one question each is what a manifest with one row a picture gives
CASES = {"tiny, 32 pictures × 8 questions": ("tiny", 32, 8), "tiny, 32 pictures × 1 question": ("tiny", 32, 1),
         "small, 8 pictures × 8 questions": ("small", 8, 8), "small, 8 pictures × 1 question": ("small", 8, 1)}
SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.98), "weight_decay": 0.02, "clip": 1.0, "gate_weight": 0.01}
BATCHES = 4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ---------------------------------------------------------------------- what both sides work on
def make_model(preset, answers, seed=0):
    """A VLJEPA whose predictor and Y-Encoder have the preset's sizes; the parts that are not trained are small."""
    from xuravljepa.model import VLJEPA
    from xuravljepa.presets import VLJEPAConfig

    config = VLJEPAConfig.preset(preset)
    config = config.replace(answers=tuple(answers), vision=config.vision.replace(depth=1),
                            decoder=config.decoder.replace(n_layers=1))
    model = VLJEPA(config, rng=np.random.default_rng(seed))
    model.requires_grad_(False)
    for part in (model.predictor, model.y_encoder, model.log_scale):
        part.requires_grad_()
    return model


def write_case(path, preset, pictures, turns):
    """Weights, batches and sizes of a case as one .npz, which both sides read."""
    from training.data.dataset import Dataset
    from training.phases.jepa import QuestionBatches

    rows = [*Dataset.scenes("train", 4 * pictures, per_type=3).rows,
            *Dataset.tools("train", 4 * pictures, pools=("known", "known", "train")).rows]
    answers = sorted({row.answer for row in rows} | set(map(str, range(31))))
    model, rng = make_model(preset, answers), np.random.default_rng(1)
    sizes = model.config.predictor
    features = rng.standard_normal((64, sizes.n_visual, sizes.vision_dim), np.float32)
    model.predictor.fit_vision(features)
    source = QuestionBatches(model, rows, lambda rows: rng.permutation(features)[: len(rows)], pictures, turns=turns)
    arrays = {f"weight.{name}": array for name, array in model.state_dict().items()
              if name.startswith(("predictor.", "y_encoder.", "log_scale"))}
    for number in range(BATCHES):
        batch = source.batch(number)
        places = [answers.index(text) for text in batch["answers"]]
        arrays[f"batch.{number}.target"] = np.array(places)
        for turn, part in enumerate(batch["turns"]):
            for name in ("query", "visual", "tool"):
                if part[name] is not None:
                    arrays[f"batch.{number}.{turn}.{name}"] = part[name]
    about = {"preset": preset, "turns": source.turns, "answers": answers, "predictor": sizes.to_dict(),
             "text": model.config.text.to_dict(), "settings": SETTINGS}
    np.savez(path, about=json.dumps(about), answer_ids=model.y_encoder.tokens(answers), **arrays)


def read_case(path):
    """(about, weights, ids of the answers, batches: each (turns, target))."""
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    weights = {name.removeprefix("weight."): array for name, array in arrays.items() if name.startswith("weight.")}
    batches = []
    for number in range(BATCHES):
        turns = [{name: arrays.get(f"batch.{number}.{turn}.{name}") for name in ("query", "visual", "tool")}
                 for turn in range(about["turns"])]
        batches.append((turns, arrays[f"batch.{number}.target"]))
    return about, weights, arrays["answer_ids"], batches


# ---------------------------------------------------------------------- our side
class Ours:
    """forward(batch) → loss; backward(loss); update(); all as the Trainer does them."""

    def __init__(self, path, threads):
        import xuracore as xc
        from training.optim import AdamW, parameter_groups

        xc.set_num_threads(threads)
        about, weights, _, self.batches = read_case(path)
        self.answers, settings = about["answers"], about["settings"]
        self.model = make_model(about["preset"], self.answers, seed=2)
        state = self.model.state_dict()
        self.model.load_state_dict({**state, **weights})
        groups = parameter_groups(self.model, settings["weight_decay"])
        self.optimizer = AdamW(groups, lr=settings["lr"], betas=settings["betas"])
        self.clip, self.gate_weight = settings["clip"], settings["gate_weight"]
        self.model.train()

    def forward(self, batch):
        from xuracore import ops

        self.optimizer.zero_grad()
        model, ((first, *later), target) = self.model, batch
        reading = model.predictor(first["query"], first["visual"], first["tool"])
        opened, predicted = float(np.mean(model.predictor.gate_activation())), [reading.embedding]
        for turn in later:
            reading = model.predictor.read(turn["query"], reading.states)
            predicted.append(reading.embedding)
        embedding = ops.concatenate(*predicted, axis=0) if later else predicted[0]
        encoded = model.encode_answers(self.answers)
        loss = ops.multi_positive_info_nce(embedding, encoded, target, model.log_scale)
        hits = float(np.mean((embedding.data @ encoded.data.T).argmax(axis=1) == target))
        penalty = sum((layer.gate.regulariser() for layer in model.predictor.layers), start=0.0)
        loss = loss + penalty * (self.gate_weight / len(model.predictor.layers))
        self.metrics = hits, opened
        return loss, loss.item()

    def backward(self, loss):
        loss.backward()

    def update(self):
        from training.optim import clip_grad_norm

        clip_grad_norm(self.optimizer.parameters(), self.clip)
        self.optimizer.step()
        self.model.clamp_scale()

    def gradients(self):
        return {name: p.grad for name, p in self.optimizer.named_parameters()}


def torch_side(path, threads):
    from tests.benchmarks.predictor_torch import Torch

    return Torch(path, threads)


SIDES = {"ours": Ours, "torch": torch_side}


# ---------------------------------------------------------------------- taking turns
def serve(side, path, threads, budget, clock):
    """In the child: compare first, then answer each line with the seconds of some steps."""
    work = SIDES[side](path, threads)
    loss, value = work.forward(work.batches[0])
    work.backward(loss)
    del loss
    np.savez(f"{path}.{side}.npz", loss=value, **work.gradients())
    for batch in work.batches:  # compiles, and lets allocators settle
        step(work, batch, clock)
    print("ready", flush=True)
    count = 0
    for _ in sys.stdin:
        times, end = [], time.perf_counter() + budget
        while not times or time.perf_counter() < end:
            times.append(step(work, work.batches[count % BATCHES], clock))
            count += 1
        print(json.dumps([times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)


def step(work, batch, clock):
    """Seconds of (forward and loss, backward, clip and AdamW)."""
    marks = [clock()]
    loss, _ = work.forward(batch)
    marks.append(clock())
    work.backward(loss)
    del loss
    marks.append(clock())
    work.update()
    marks.append(clock())
    return [b - a for a, b in zip(marks, marks[1:])]


def start(side, path, threads, options):
    python = sys.executable if side == "ours" else options.peer_python
    environment = {**os.environ, **dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XURA_NUM_THREADS"), str(threads))}
    command = [python, sys.argv[0], "--side", side, "--case", str(path), "--threads", str(threads),
               "--budget", str(options.budget), "--clock", options.clock]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def answer(child, side):
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"the side {side!r} ended; its message is above")
    return line.strip()


def differences(path):
    """(|loss difference|, the largest of |gradient difference| / |all gradients|)."""
    ours, other = (dict(np.load(f"{path}.{side}.npz")) for side in SIDES)
    whole = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for name, g in other.items() if name != "loss"))
    worst = max(float(np.linalg.norm(ours[name].astype(np.float64) - g)) for name, g in other.items() if name != "loss")
    return abs(float(ours["loss"] - other["loss"])), worst / whole


def compare(label, path, threads, options):
    children, found = {side: start(side, path, threads, options) for side in SIDES}, {side: [] for side in SIDES}
    peak = {}
    try:
        for side, child in children.items():
            answer(child, side)
        loss, gradient = differences(path)
        if loss > 1e-3 or gradient > 1e-3:
            raise SystemExit(f"{label}: the sides differ: loss by {loss:.2g}, gradients by {gradient:.2g}")
        for _ in range(options.rounds):
            for side, child in children.items():
                child.stdin.write("go\n")
                child.stdin.flush()
                times, peak[side] = json.loads(answer(child, side))
                found[side] += times
    finally:
        for child in children.values():
            child.stdin.close()
            child.wait()
    medians = {side: [statistics.median(column) for column in zip(*times)] + [statistics.median(map(sum, times))]
               for side, times in found.items()}
    cells = [f"{1e3 * a:.1f} / {1e3 * b:.1f}" for a, b in zip(medians["ours"], medians["torch"])]
    ratio = medians["torch"][-1] / medians["ours"][-1]
    print(f"| {label} | {threads} | {' | '.join(cells)} | **{ratio:.2f}** | {peak['ours']:.0f} / {peak['torch']:.0f} "
          f"| {gradient:.0e} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the cases whose label contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=(2, 1), help="thread counts to run")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per turn, at least one step")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time, all threads together; fair on a busy machine with one thread")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.case, options.threads[0], options.budget, CLOCKS[options.clock])
        return
    print(f"ours / torch: medians in ms of {options.clock} time over {options.rounds} turns of each; peak MB\n")
    print("| case | threads | forward, loss | backward | clip, AdamW | step | faster | peak MB | gradients differ |\n"
          "|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (label, case) in enumerate(CASES.items()):
            if options.only in label:
                path = Path(folder) / f"{number}.npz"
                write_case(path, *case)
                for threads in options.threads:
                    compare(label, path, threads, options)


if __name__ == "__main__":
    main()
