"""The fault campaign, short: see tests/campaigns/faults.py for the one that takes minutes."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "campaigns" / "faults.py"


@pytest.fixture(scope="module")
def faults():
    specification = importlib.util.spec_from_file_location("faults", PATH)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_nothing_breaks_that_should_not(faults):
    rows = faults.campaign(kills=3, flips=100, fuzz=1000, soak_minutes=None)
    assert len(rows) == 4 and all(trials > 50 for _, trials, _, _ in rows[1:])
    assert {what: failures for what, _, failures, _ in rows if failures} == {}


def test_a_torn_checkpoint_would_be_counted(faults, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "is_whole", lambda checkpoint: False)
    trials, failures, _ = faults.fail_each_call(tmp_path)
    assert trials == failures > 30


@pytest.mark.slow
def test_a_training_run_keeps_its_size(faults, tmp_path):
    steps, failures, detail = faults.soak(tmp_path, 0.2)
    assert steps >= 200 and failures == 0, detail
