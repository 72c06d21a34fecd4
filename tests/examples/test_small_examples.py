"""The short examples are short, run with the shipped agent, and end mistakes with one line."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.scenes import render, scene
from xuravljepa.cli import NOTICE

ROOT = Path(__file__).parents[2]
NAMES = ("embed_in_app", "custom_tool", "watch_folder")


@pytest.fixture
def example(capsys):
    """example(name, *arguments) → (exit code, stdout, stderr) of a script run by its path."""

    def run(name, *arguments):
        path = ROOT / "examples" / f"{name}.py"
        earlier = sys.argv, sys.path[0]
        sys.argv = [str(path), *map(str, arguments)]
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code or 0, *capsys.readouterr()
        finally:
            sys.argv, sys.path[0] = earlier

    return run


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text("utf-8").splitlines()) < 60


def test_an_application_learns_whether_it_may_use_the_answer(example, tmp_path):
    code, out, _ = example("embed_in_app", "--state", tmp_path / "state")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and (tmp_path / "state").stat().st_size > 10_000
    assert first["use"] is second["use"] is True and {first["answer"], second["answer"]} <= {"square", "2"}
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    _, out, _ = example("embed_in_app", "--image", tmp_path / "noise.png", "--ask", "what shape is the red one?")
    assert json.loads(out)["use"] is False


def test_a_tool_of_ones_own_is_called_and_believed(example):
    code, out, _ = example("custom_tool")
    assert code == 0 and 'weigh(shape="square", material="glass") → 9' in out
    assert out.splitlines()[-1] == "9"


def test_a_folder_is_watched_and_asked_afterwards(example, tmp_path):
    for number, index in enumerate([0, 0, 1, 1]):
        Image.fromarray(np.asarray(render(scene("test", index)))).save(tmp_path / f"shot{number}.png")
    (tmp_path / "shot2b.png").write_bytes(b"broken")
    asked = "how many circles are there?"
    code, out, err = example("watch_folder", tmp_path, "--once", "--recall", asked)
    changes = [line for line in out.splitlines() if line.startswith("change")]
    seen = out.splitlines()[len(changes):]
    assert code == 0 and changes[0].startswith("change 1: 3") and "skipped" in err and "shot2b.png" in err
    assert [Path(line.split("  ")[1].split(":")[0]).name for line in seen] == ["shot2.png", "shot0.png"]
    assert ": 3 (" in seen[1]
    assert example("watch_folder", tmp_path, "--recall", asked)[1].splitlines() == seen


def test_mistakes_are_one_line(example, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name, *arguments in (("embed_in_app", "--image", tmp_path / "broken.png"),
                             ("custom_tool", "--image", tmp_path / "missing.png"),
                             ("embed_in_app", "--model", tmp_path / "nowhere"), ("watch_folder",)):
        code, out, err = example(name, *arguments)
        lines = [line for line in err.splitlines() if line != NOTICE]
        assert code == 2 and out == "" and "error: " in lines[-1] and "Traceback" not in err
