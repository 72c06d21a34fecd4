"""``python tests/xuracore/footguns_page.py`` writes ``xuracore/FOOTGUNS.md`` from ``test_footguns.py``."""

import ast
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "xuracore" / "FOOTGUNS.md"
STALE = "test_the_page_is_what_the_tests_say"
HEAD = """# Footguns

What surprises people who come from NumPy or from another engine. Every entry is a test of
[`tests/xuracore/test_footguns.py`](../tests/xuracore/test_footguns.py) and this page is written from it, so the
code below runs as it stands, with `np`, `xc`, `nn`, `ops`, `pytest` and modules of the standard library imported.
A test fails when the page is stale; `python tests/xuracore/footguns_page.py` writes it anew.
"""


def page():
    """The page as text: comment lines of dashes begin a section, each test is an entry."""
    source = (HERE / "test_footguns.py").read_text("utf-8")
    lines, parts, sections = source.splitlines(), [HEAD], {}
    for number, line in enumerate(lines, 1):
        if line.startswith("# ------"):
            sections[number] = line.strip("# -")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name != STALE:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            for number in [n for n in sections if n < first]:
                title = sections.pop(number)
                parts.append(f"## {title[0].upper()}{title[1:]}\n")
            title = node.name.removeprefix("test_").replace("_", " ")
            about = textwrap.dedent(ast.get_docstring(node) or "")
            body = node.body[1:] if about else node.body
            code = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : node.end_lineno]))
            parts.append(f"### {title[0].upper()}{title[1:]}\n\n{about}\n\n```python\n{code}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
