"""The README tells the truth: its Python runs, its files are there, its commands are understood."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from xuravljepa import cli
from xuravljepa.model import SHIPPED

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "training/README.md")


def text(page):
    return (ROOT / page).read_text("utf-8")


def blocks(page):
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, shown = {"__name__": "readme"}, io.StringIO()
    for code in blocks(page):
        if '"tiny"' in code and not (SHIPPED / "tiny" / "model.safetensors").exists():
            break  # what follows needs the agent as well
        with contextlib.redirect_stdout(shown):
            exec(compile(code, page, "exec"), scope)
    assert shown.getvalue() or not blocks(page)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_page_names_exist(page):
    here = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text(page)) if "://" not in link]
    assert links and [link for link in links if not (here / link).exists()] == []
    named = set(re.findall(r"(?:training/scripts|examples)/\w+\.py", text(page)))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_options_of_scripts_that_the_page_uses_exist(page, capsys):
    """Every ``--option`` of a command line in the page is in the help of that command."""
    lines = re.findall(r"^ {4}(?:python (?:training/scripts|examples)/(\w+)\.py|xura (\w[\w-]*) (\w+)?)(.*)$",
                       text(page), re.MULTILINE)
    assert lines
    commands = {script: ["train", name] for name, script in cli.PHASES.items()}
    commands |= {script: [name] for name, script in cli.SCRIPTS.items()}
    for script, command, phase, rest in lines:
        words = commands.get(script) or ([command, phase] if phase in cli.PHASES else [command])
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))
        if not options:
            continue
        if script and script not in commands:
            (file,) = [*ROOT.glob(f"training/scripts/{script}.py"), *ROOT.glob(f"examples/{script}.py")]
            told = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True, check=True).stdout
        else:
            with pytest.raises(SystemExit):
                cli.main([*words, "--help"])
            told = capsys.readouterr().out
        assert options <= set(re.findall(r"--[a-z][a-z-]*", told)), (words, rest)


def test_the_two_commands_are_those_of_the_check():
    """``.ci/run`` takes the test command from the README by this pattern."""
    pattern = re.compile(r"install .*\[test\].*pytest")
    commands = [line.strip() for line in text("README.md").splitlines() if pattern.search(line)]
    assert commands and all(shlex.split(part) for part in commands[0].split("&&"))
    assert "python -m pip install . && python examples/agent_demo.py" in text("README.md")
