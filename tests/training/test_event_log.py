"""TensorBoard's files hold what metrics.jsonl holds, and only who asks for them needs the package."""

import sys
import types

import numpy as np
import pytest

from training import optim, schedules
from training.event_log import EventLog
from training.loop import Trainer, TrainerConfig
from training.progress import read_metrics
from xuracore import nn
from xuracore.errors import MissingExtraError


class Points:
    def batch(self, index):
        return np.random.default_rng(index).standard_normal((4, 3)).astype(np.float32)


def trainer(folder, event_log=True, **changes):
    model = nn.Linear(3, 1, rng=np.random.default_rng(0))
    config = TrainerConfig(steps=12, log_every=5, prefetch=False, event_log=event_log, **changes)
    return Trainer(model, lambda model, batch, rng: ((model(batch) ** 2).mean(), {"half": 0.5}), optim.SGD(model, 0.1),
                   schedules.constant(0.1), Points(), config, folder, stream=None,
                   evaluate=lambda model, step: {"left of": 0.5})


class Writer:
    """What tensorboardX.SummaryWriter is asked for, remembered."""

    made = []

    def __init__(self, logdir, purge_step=None):
        self.logdir, self.purge_step, self.scalars, self.closed = logdir, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def test_every_number_of_the_log_is_a_scalar_of_its_split(tmp_path, writers):
    trainer(tmp_path, evaluate_every=6).run()
    (writer,) = writers
    assert writer.closed and writer.logdir == str(tmp_path / "events") and writer.purge_step is None
    assert ("validation/left_of", 0.5, 6) in writer.scalars
    expected = [(f"train/{name}", value, record["step"]) for record in read_metrics(tmp_path / "metrics.jsonl")
                if record["split"] == "train" for name, value in record.items() if name not in ("step", "split")]
    assert [scalar for scalar in writer.scalars if scalar[0].startswith("train/")] == expected


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path, writers):
    trainer(tmp_path).run(stop_at=6)
    trainer(tmp_path).run(resume=True)
    assert [writer.purge_step for writer in writers] == [None, 7]


def test_without_the_package_the_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"tensorboardX.*xura\[tensorboard\]"):
        trainer(tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    assert trainer(tmp_path / "run", event_log=False).run().complete


def test_the_real_writer_writes_what_it_reads(tmp_path):
    pytest.importorskip("tensorboardX")
    log = EventLog(tmp_path)
    log.write({"step": 3, "split": "train", "loss": 0.5, "note": "text"})
    log.close()
    (file,) = tmp_path.iterdir()
    assert b"train/loss" in file.read_bytes() and b"note" not in file.read_bytes()
