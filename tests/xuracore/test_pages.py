"""The pages beside the engine tell the truth: their Python runs, what they name exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import xuracore

FOLDER = Path(xuracore.__file__).parent
PAGES = [page.name for page in sorted(FOLDER.glob("*.md")) if page.name != "FOOTGUNS.md"]  # that one is made of tests


@pytest.mark.skipif(not PAGES, reason="installed without its pages")
def test_the_pages_are_here():
    assert "EMBEDDING.md" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_python_of_the_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    """A comment ``# → text`` after a print is what it prints."""
    monkeypatch.chdir(tmp_path)
    text = (FOLDER / page).read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope, shown = {"__name__": "page"}, io.StringIO()
    threads = xuracore.get_num_threads()
    try:
        with contextlib.redirect_stdout(shown):
            for code in blocks:
                exec(compile(code, page, "exec"), scope)
    finally:
        xuracore.set_num_threads(threads)
    said = re.findall(r"print\(.*\)  # → (.*)", text)
    assert blocks and shown.getvalue().splitlines() == said


@pytest.mark.parametrize("page", PAGES)
def test_variables_and_commands_that_the_page_names_exist(page):
    text = (FOLDER / page).read_text("utf-8")
    source = "\n".join(path.read_text("utf-8") for path in FOLDER.rglob("*.py"))
    variables = set(re.findall(r"\b(?:XURA|NUMBA|OMP|OPENBLAS)_[A-Z_]+", text))
    assert variables and all(name in source for name in variables)
    commands = set(re.findall(r"python -m xuracore (\w+)", text))
    assert commands and all(re.search(rf'add_parser\(\s*"{name}"', source) for name in commands)
