"""The chat answers line by line, keeps what it saw from turn to turn, and survives any line."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xuracore
from xuravljepa import cli, cli_chat
from xuravljepa.agent.agent import Agent
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.model import VLJEPA
from xuravljepa.presets import VLJEPAConfig

ROOT = Path(xuracore.__file__).parent.parent
ANSWERS = ("circle", "square", *map(str, range(31)))
ASKED = "what shape is the red one?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An agent with random weights that always doubts, and two pictures."""
    path = tmp_path_factory.mktemp("agent")
    model = VLJEPA(VLJEPAConfig.tiny().replace(answers=ANSWERS), rng=np.random.default_rng(0))
    heads = AgentHeads(AgentConfig.for_model(model.config), model.config.predictor, rng=np.random.default_rng(1))
    heads.monitor.output.weight.data[:] = 0
    heads.monitor.trust.data[:] = 0
    heads.monitor.output.bias.data[:] = 4.0
    Agent(model, heads).save_pretrained(path)
    (path / "prices.json").write_text('{"zorba": {"circle": 7}}')
    for name, low in (("a", 0), ("b", 200)):
        pixels = np.random.default_rng(low).integers(low, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


@pytest.fixture
def chat(folder, tmp_path, monkeypatch, capsys):
    """chat(lines, *arguments) → (exit code, lines of stdout, lines of stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "compiling_notice", contextlib.nullcontext)

    def run(lines, *arguments):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = cli.main(["chat", "--model", str(folder), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_the_picture_stays_from_turn_to_turn(chat, folder):
    code, out, err = chat([f":image {folder}/a.png", ASKED, "", ASKED, f":image {folder}/b.png", ASKED])
    assert (code, err) == (0, [])
    looked, first, second, _, _ = out
    assert "looking at" in looked and first == second and "best guess" in first and "% sure" in first
    alone = chat([ASKED], folder / "b.png")
    assert alone[1][1:] == out[4:]


def test_the_name_of_a_file_brings_it_into_view_and_other_ways_to_ask_for_help_work(chat, folder):
    code, out, err = chat([f"{folder}/a.png", ASKED, "help", "exit", ASKED])
    assert (code, err) == (0, []) and out[:2] == chat([f":image {folder}/a.png", ASKED])[1]
    assert "\n".join(out[2:]) == cli_chat.HELP


def test_a_state_goes_on_in_another_chat(chat, folder):
    code, out, _ = chat([ASKED, ":save seen.state", ":quit", "never read"], folder / "a.png")
    assert code == 0 and out[2] == "saved" and len(out) == 3
    code, again, err = chat([":load seen.state", ASKED])
    assert (code, err) == (0, []) and "loaded" in again[0] and again[1] == out[1]


def test_what_was_seen_can_be_asked_in_another_chat(chat, folder):
    lines = [f":image {folder}/a.png", f":image {folder}/b.png", ":memory"]
    code, out, err = chat(lines, "--memory", "seen")
    assert (code, err) == (0, []) and [line.endswith(name) for line, name in zip(out[2:], ("b.png", "a.png"))]
    code, out, err = chat([":memory", f":memory {ASKED}"], "--memory", "seen")
    assert (code, err) == (0, []) and sum(f"a.png: {answer}" in line for line in out for answer in ANSWERS) == 1
    assert chat([":memory"], "--memory", "empty")[1] == ["nothing was seen yet"]


def test_commands_tell(chat, folder):
    code, out, err = chat([":trace", ":t", ":tools", ":h", "what does the red one cost at zorba?", ":trace"],
                          folder / "a.png")
    assert code == 1 and "nothing was asked" in err[0] and "no command :t;" in err[1]
    text = "\n".join(out)
    assert "lookup(shop, item)" in text and all(f":{name}" in text for name in cli_chat.Chat.COMMANDS)
    assert "read the picture" in text


@pytest.mark.parametrize("line, says", [
    (ASKED, "no picture"), (":image", "needs the name"), (":image missing.png", "no such file"),
    (":load missing", "cannot be read"), (":save x", "seen nothing"), (":nonsense", "no command"), (":", "no command"),
    (":memory", "--memory DIR"), ("x " * 3000, "limit"), ("\x1b[2J :image", "no picture"),
    (":image \x1b[2J", "no such file")])
def test_a_line_that_makes_no_sense_is_one_line_and_the_chat_goes_on(chat, line, says):
    code, out, err = chat([line, ":help"])
    assert code == 1 and len(err) == 1 and says in err[0] and "\x1b" not in err[0]
    assert out == cli_chat.HELP.splitlines()


def test_a_missing_picture_or_model_ends_it(chat, tmp_path):
    for arguments in (["missing.png"], ["--model", "nowhere"]):
        assert chat([ASKED], *arguments)[0] == 2
    (tmp_path / "file").write_text("")
    assert chat([], "--memory", "file")[0] in (1, 2)


def test_bytes_from_a_pipe(folder, tmp_path):
    """The real command: no prompt, no traceback, bytes that are no text, an end without a line break."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    sent = f":image {folder}/a.png\n".encode() + b"\xff\xfe?\r\n:tools\n" + ASKED.encode()
    result = subprocess.run([sys.executable, "-m", "xuravljepa.cli", "chat", "--model", str(folder)], input=sent,
                            capture_output=True, timeout=120, env=environment, cwd=tmp_path)
    out = result.stdout.decode().splitlines()
    assert b"Traceback" not in result.stderr and result.returncode == 0
    assert "looking" in out[0] and "% sure" in out[1] and "% sure" in out[-1] and not any("> " in o for o in out)


def test_on_a_terminal_it_prompts_and_a_mistake_is_no_failure(folder, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, ":nonsense", ":help", EOFError])
    prompts = []

    def type_line(prompt):
        prompts.append(prompt)
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    talk = cli_chat.Chat(Agent.from_pretrained(folder))
    talk.interactive = True
    assert talk.talk() == 0 and prompts == ["> "] * 4
    out, err = capsys.readouterr()
    assert cli_chat.HELP in out and "(interrupted" in out and "no command" in err
