"""The demo runs with any agent, says the same every time, and never bluffs its way past a bad picture."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.questions import QUESTION_TYPES
from training.data.tools_data import write_price_list
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.trace import read_traces
from xuravljepa.cli import NOTICE
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig

ROOT = Path(__file__).parents[2]
QUESTIONS = 9  # of a scene in which every type can be asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An agent with random weights that always doubts; the tools look into the real price list."""
    path = tmp_path_factory.mktemp("agent")
    words = {answer for kind in QUESTION_TYPES.values() for answer in kind.answers}
    config = VLJEPAConfig.tiny().replace(answers=(*sorted(words), *map(str, range(5, 31))))
    model = VLJEPA(config, rng=np.random.default_rng(0))
    heads = AgentHeads(AgentConfig.for_model(config), config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.weight.data[:] = 0
    heads.monitor.trust.data[:] = 0
    heads.monitor.output.bias.data[:] = 4.0
    Agent(model, heads).save_pretrained(path)
    write_price_list(path / "prices.json")
    return path


def demo(folder, cwd, *arguments):
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, ROOT / "examples" / "agent_demo.py", "--model", folder, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=cwd,
                          env=environment, encoding="utf-8")


def test_a_scene_becomes_a_story_a_page_and_a_picture(folder, tmp_path):
    result = demo(folder, tmp_path, "--seed", "0", "--trace", "run.jsonl")
    assert result.returncode == 0, result.stderr
    assert "test scene 0" in result.stdout and "read the picture" in result.stdout
    traces = list(read_traces(tmp_path / "run.jsonl"))
    assert len(traces) == QUESTIONS and all(trace.run.expected for trace in traces)
    assert [step.tool for trace in traces for step in trace.calls()][-1] == "calculator"
    page = (tmp_path / "xura-demo" / "story.html").read_text("utf-8")
    assert all(trace.run.question.split("?")[0] in page for trace in traces)
    assert not re.search(r'(src|href)="(?!data:)', page)
    with Image.open(tmp_path / "xura-demo" / "story.png") as image:
        assert image.width > 500


def test_the_story_it_chooses_can_be_told_again(folder, tmp_path):
    chosen = demo(folder, tmp_path, "--quiet").stdout.splitlines()
    number = re.fullmatch(r"test scene (\d+): .*", chosen[0])[1]
    again = demo(folder, tmp_path, "--quiet", "--seed", number).stdout.splitlines()
    assert chosen[:-1] == again[:-1]  # the last line is the time it took
    assert sum("% sure" in line for line in chosen) == QUESTIONS


def test_a_picture_that_it_cannot_understand_makes_it_unsure(folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    asked = "--ask", "what shape is the red one?", "--ask", "any?"
    result = demo(folder, tmp_path, "--image", "photo.jpg", *asked)
    assert result.returncode == 0 and result.stdout.count("a guess") >= 2


def test_mistakes_are_one_line(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for arguments in (["--image", "missing.png"], ["--image", "broken.png"], ["--seed", "-1"], ["--ask", " "],
                      ["--model", "nowhere"]):
        result = demo(folder, tmp_path, *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        (line,) = (line for line in result.stderr.splitlines() if line != NOTICE)
        assert line.startswith("error: ")
