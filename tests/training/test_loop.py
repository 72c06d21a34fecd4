"""The loop: resume is exact, interruption saves, what is not finite is skipped, and the log is honest."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from training import checkpoint, optim, schedules
from training.loop import Trainer, TrainerConfig, TrainingDiverged
from training.progress import TIMINGS, MetricLog, ProgressLine, duration, read_metrics
from xuracore import nn, ops
from xuracore.errors import ConfigError, FormatError


class Model(nn.Module):
    def __init__(self, rng):
        self.first, self.norm = nn.Linear(4, 16, rng=rng), nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.2, rng=np.random.default_rng(7))
        self.last = nn.Linear(16, 3, rng=rng)

    def forward(self, x):
        return self.last(self.dropout(ops.gelu(self.norm(self.first(x)))))


class Batches:
    """Points labelled by the largest of their first three coordinates."""

    def batch(self, index):
        x = np.random.default_rng([5, index]).standard_normal((16, 4)).astype(np.float32)
        return {"x": x, "label": x[:, :3].argmax(axis=1)}


def loss_function(model, batch, rng):
    noise = (0.01 * rng.standard_normal(batch["x"].shape)).astype(np.float32)
    logits = model(batch["x"] + noise)
    loss = ops.cross_entropy(logits, batch["label"])
    return loss, {"accuracy": (logits.data.argmax(axis=1) == batch["label"]).mean()}


def trainer(
    output_dir, batches=None, loss=loss_function, describe=None, stream=None, evaluate=None, **changes
):
    settings = {"steps": 12, "accumulate": 2, "ema_decay": 0.9, "log_every": 5, "prefetch": False, **changes}
    model = Model(np.random.default_rng(0))
    optimizer = optim.AdamW(optim.parameter_groups(model, weight_decay=0.1), lr=0.01)
    schedule = schedules.cosine(0.01, 12, 2)
    return Trainer(
        model, loss, optimizer, schedule, batches or Batches(), TrainerConfig(**settings), output_dir,
        describe=describe, stream=stream, evaluate=evaluate,
    )  # fmt: skip


def everything(run):
    """Digest of all tensors of a run."""
    tensors = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    tensors.update({f"optimizer.{k}": v for k, v in run.optimizer.state_dict().items()})
    tensors.update({f"average.{k}": v for k, v in run.average.state_dict().items()})
    return checkpoint.digest(tensors)


def log_without_times(folder):
    return [
        {k: v for k, v in record.items() if k not in TIMINGS}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("prefetch", [False, True])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, prefetch):
    """2N steps = N + resume + N: parameters, moments, averages, dropout, and the log."""
    straight = trainer(tmp_path / "straight", prefetch=prefetch)
    straight.run()
    first = trainer(tmp_path / "resumed", prefetch=prefetch)
    assert first.run(stop_at=6).step == 6
    second = trainer(tmp_path / "resumed", prefetch=prefetch)
    second.model.first.weight.data[...] = 0  # whatever it held before, the checkpoint decides
    assert second.run(resume=True).step == 12
    assert everything(straight) == everything(second) != everything(first)
    assert log_without_times(tmp_path / "straight") == log_without_times(tmp_path / "resumed")
    assert [r["step"] for r in log_without_times(tmp_path / "straight")] == [5, 10, 12]


def test_a_run_ended_by_a_signal_resumes_as_exactly(tmp_path):
    trainer(tmp_path / "straight").run()

    class Interrupting(Batches):
        def batch(self, index):
            if index == 2 * 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(index)

    result = trainer(tmp_path / "cut", batches=Interrupting()).run()
    assert (result.step, result.reason, result.exit_code) == (8, "SIGTERM", 0)
    trainer(tmp_path / "cut").run(resume=True)
    assert log_without_times(tmp_path / "straight") == log_without_times(tmp_path / "cut")


def test_training_learns(tmp_path):
    run = trainer(tmp_path, steps=150, accumulate=1)
    run.schedule = schedules.constant(0.01)
    run.run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["loss"] < 0.6 * records[0]["loss"] and records[-1]["accuracy"] > 0.8


def test_accumulating_equals_one_large_batch():
    class Halves(Batches):
        def batch(self, index):
            whole = super().batch(index // 2)
            half = slice(0, 8) if index % 2 == 0 else slice(8, 16)
            return {name: array[half] for name, array in whole.items()}

    def plain(model, batch, rng):
        return ops.cross_entropy(model(batch["x"]), batch["label"]), {}

    large = trainer(None, loss=plain, steps=3, accumulate=1)
    halves = trainer(None, batches=Halves(), loss=plain, steps=3, accumulate=2)
    for run in (large, halves):
        run.model.dropout.rate = 0
        run.run()
    for name, array in large.model.state_dict().items():
        np.testing.assert_allclose(halves.model.state_dict()[name], array, rtol=2e-4, atol=2e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(tmp_path):
    def poisoned(model, batch, rng):
        loss, metrics = loss_function(model, batch, rng)
        return (loss * float("nan"), metrics) if run.step == 1 else (loss, metrics)

    out = io.StringIO()
    run = trainer(tmp_path, loss=poisoned, stream=out, steps=4)
    before = {}

    def remember(model):
        before.setdefault(run.step, {k: v.copy() for k, v in model.state_dict().items()})

    run.after_step = remember
    run.run()
    assert sorted(before) == [0, 2, 3] and run.skipped == 1
    assert "step 2 skipped" in out.getvalue()
    assert all(np.isfinite(v).all() for v in run.model.state_dict().values())
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert record["skipped"] == 1 and np.isfinite(record["loss"])


def test_giving_up_after_too_many_such_steps_keeps_the_last_checkpoint(tmp_path):
    def poisoned(model, batch, rng):
        loss, metrics = loss_function(model, batch, rng)
        return (loss * float("inf"), metrics) if run.step >= 4 else (loss, metrics)

    run = trainer(tmp_path, loss=poisoned, save_every=4, max_skips=3)
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        run.run()
    again = trainer(tmp_path)
    again.resume()
    assert again.step == 4


def test_an_existing_run_is_never_overwritten_by_accident(tmp_path):
    trainer(tmp_path, steps=2).run()
    with pytest.raises(ConfigError, match="holds a run at step 2"):
        trainer(tmp_path, steps=2).run()
    trainer(tmp_path, steps=1).run(overwrite=True)
    assert trainer(tmp_path)._directory().steps() == [1]


def test_resuming_under_another_configuration_is_refused(tmp_path):
    trainer(tmp_path, steps=2, describe={"shape": (1, 2)}).run()
    trainer(tmp_path, steps=3, describe={"shape": (1, 2)}).run(resume=True)
    with pytest.raises(ConfigError, match="accumulate was 2, is 1"):
        trainer(tmp_path, describe={"shape": (1, 2)}, accumulate=1).run(resume=True)
    with pytest.raises(ConfigError, match="shape was \\[1, 2\\], is \\[1, 3\\]"):
        trainer(tmp_path, describe={"shape": (1, 3)}).run(resume=True)
    with pytest.raises(FormatError, match="averaged"):
        trainer(tmp_path, describe={"shape": (1, 2)}, ema_decay=None).run(resume=True)


def test_evaluation_sees_averaged_weights_and_stops_when_patience_ends(tmp_path):
    seen = []

    def evaluate(model, step):
        assert not model.training
        seen.append(model.first.weight.data.copy())
        return {"score": [0.1, 0.5, 0.4, 0.3, 0.9][len(seen) - 1]}

    run = trainer(tmp_path, evaluate=evaluate, evaluate_every=2, monitor="score", patience=2)
    result = run.run()
    assert (result.step, result.reason, result.best) == (8, "patience", 0.5)
    assert run.model.training and not np.array_equal(seen[-1], run.model.first.weight.data)
    np.testing.assert_array_equal(seen[-1], run.average.averages["first.weight"])
    best = checkpoint_of(tmp_path / "best")
    assert best.step == 4
    np.testing.assert_array_equal(best.model["first.weight"], seen[1])


def scores(*values):
    """An evaluation that gives one number after the other, by the step it is asked at."""
    return lambda model, step: {"score": values[step // 2 - 1]}


MONITORED = {"evaluate_every": 2, "monitor": "score", "steps": 10}


def test_the_result_is_the_best_weights(tmp_path):
    run = trainer(tmp_path, evaluate=scores(0.1, 0.5, 0.4, 0.3, 0.2), **MONITORED)
    assert run.run().complete
    last, best = run.model.first.weight.data.copy(), checkpoint_of(tmp_path / "best")
    run.adopt()
    np.testing.assert_array_equal(run.model.first.weight.data, best.model["first.weight"])
    assert not np.array_equal(run.model.first.weight.data, last)
    assert best.trainer == {"step": 4, "monitor": "score", "value": 0.5}


def test_without_a_monitored_number_the_result_is_the_average():
    run = trainer(None)
    run.run()
    run.adopt()
    np.testing.assert_array_equal(run.model.first.weight.data, run.average.averages["first.weight"])


def test_the_best_so_far_survives_an_interruption(tmp_path):
    trainer(tmp_path, evaluate=scores(0.1, 0.5), **MONITORED).run(stop_at=5)
    run = trainer(tmp_path, evaluate=scores(0.1, 0.5, 0.4, 0.3, 0.45), **MONITORED, patience=2)
    result = run.run(resume=True)
    assert (result.best, result.step, result.reason) == (0.5, 8, "patience")
    assert checkpoint_of(tmp_path / "best").step == 4
    assert trainer(tmp_path, evaluate=scores(), **MONITORED, patience=2).run(resume=True).reason == "patience"


def test_a_gain_below_min_delta_is_kept_but_not_waited_for(tmp_path):
    values = (0.9, 0.85, 0.82, 0.6, 0.59)
    for patience, step, best in ((2, 6, 0.82), (3, 10, 0.59)):
        run = trainer(tmp_path / str(patience), evaluate=scores(*values), **MONITORED, monitor_mode="min", min_delta=0.1,
                      patience=patience)
        result = run.run()
        assert (result.step, result.best) == (step, best)
        assert checkpoint_of(tmp_path / str(patience) / "best").trainer["value"] == best


def checkpoint_of(path):
    from xuracore.io import CheckpointDirectory

    return CheckpointDirectory(path).load()


SCRIPT = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from test_loop import Batches, trainer

    class Slow(Batches):
        def batch(self, index):
            time.sleep(0.02)
            if index == 4:
                print("running", flush=True)
            return super().batch(index)

    sys.exit(trainer({folder!r}, batches=Slow(), steps=100000, stream=sys.stderr).run().exit_code)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_ends_with_the_code_shells_expect(tmp_path, number, code):
    text = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"{number.name}: stopped after step" in errors and "Traceback" not in errors
    assert trainer(tmp_path / "run")._directory().load().step >= 2


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.MT19937, np.random.SFC64])
def test_every_generator_survives_json(kind):
    generator = np.random.Generator(kind(3))
    generator.random(5, dtype=np.float32)
    state = json.loads(json.dumps(checkpoint.generator_state(generator)))
    expected = generator.standard_normal(4)
    other = np.random.Generator(kind(99))
    checkpoint.restore_generator(other, state)
    np.testing.assert_array_equal(other.standard_normal(4), expected)
    with pytest.raises(FormatError):
        checkpoint.restore_generator(np.random.default_rng(0), {"bit_generator": "Nothing"})


def test_the_log_of_a_resumed_run_drops_what_was_after_and_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    MetricLog(path, last_step=2).close()
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]


def test_the_table_says_what_the_log_says(tmp_path):
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "accuracy": 0.75, "loss": None}]
    log = MetricLog(tmp_path / "metrics.jsonl")
    for record in records:
        log.write(record)
    log.close()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,loss,accuracy", "1,0.5,", "2,0.25,", "2,,0.75"]
    MetricLog(tmp_path / "metrics.jsonl", last_step=1).close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.5"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_rewrites_a_line_on_a_terminal_and_prints_lines_elsewhere():
    for stream in (Terminal(), io.StringIO()):
        line = ProgressLine(2, stream, seconds=0)
        line.show(1, {"loss": 1.5})
        line.show(2, {"loss": 0.5})
        line.close()
        text = stream.getvalue()
        assert text.count("\r") == (1 if stream.isatty() else 0) + (text.count("\r") > 1)
        assert "step 2/2  loss 0.5  took" in text and text.endswith("\n") and "left" not in text
    assert [duration(s) for s in (4, 200, 3900)] == ["4s", "3m20s", "1h05m"]


def test_a_run_ends_with_a_drawing_and_says_what_it_cost(tmp_path):
    run = trainer(tmp_path, evaluate=scores(0.1, 0.5, 0.4, 0.3, 0.2), **MONITORED)
    run.run()
    assert "validation score" in (tmp_path / "training.svg").read_text()
    costs = next(r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train")
    assert costs["samples_per_second"] > 0 and costs["data_seconds"] >= 0 and costs["peak_mb"] > 1


@pytest.mark.parametrize("bad", [{"steps": 0}, {"accumulate": 0}, {"clip": 0.0}, {"patience": 2}, {"min_delta": -1.0}])
def test_a_configuration_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigError):
        TrainerConfig(**{"steps": 1, **bad})
