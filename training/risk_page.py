"""A page of risk–coverage curves, reliability diagrams and tables: what ``training/risk.py`` measured.

One file that refers to nothing outside itself, without a script; the same report gives the same bytes.
"""

import html
from pathlib import Path

from training.plot import line_chart
from training.risk import HIGH_IS_GOOD, IN_DOMAIN, JUDGES, MEASURES

SHOWN = ("auroc", "aupr", "ece", "ece_mass", "brier", "nll", "aurc", "e_aurc", "coverage_0.01", "coverage_0.05",
         "coverage_0.1")
CHART = (560, 330)
_STYLE = """
:root { color-scheme: light; --line: #d9dde3; --quiet: #5b6572; --good: #1b7f4b; --ink: #1c2430; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1240px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
p.note { color: var(--quiet); margin: .2rem 0 .8rem; max-width: 72ch; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .3rem; text-align: right; border-bottom: 1px solid var(--line); }
td, tbody th { white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--quiet); font-weight: 600; font-size: .85rem; }
td small { display: block; color: var(--quiet); font-size: .66rem; font-weight: 400; }
td.best { color: var(--good); font-weight: 600; }
tr.monitor { background: #f2f6fb; }
.charts { display: flex; flex-wrap: wrap; gap: .5rem; margin: .6rem 0; }
.charts svg { max-width: 100%; height: auto; flex: 1 1 460px; }
"""


def write_page(path, report, about):
    """Write the page.

    Args:
        path: file to write.
        report: what ``risk.risk_report`` gives.
        about: a sentence on model and data.
    """
    Path(path).write_text(page(report, about), encoding="utf-8", newline="\n")


def page(report, about):
    """The page as text; see ``write_page``."""
    sections = [_overview(report), *(_set(name, found) for name, found in report.items())]
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Does it know when it is wrong?</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Does it know when it is wrong?</h1>
<p class="note">{html.escape(about)}</p>
{body}
</body>
</html>
"""


def _overview(report):
    heads = ["", "questions", "wrong", *JUDGES, "monitor less max-softmax"]
    rows = []
    for name, found in report.items():
        cells = [found["judges"][judge]["auroc"] for judge in JUDGES]
        best = max(cell["value"] or 0 for cell in cells)
        rows.append("<tr>" + f"<th>{html.escape(name)}</th><td>{found['questions']:,}</td><td>{found['wrong']:.1%}</td>"
                    + "".join(_cell(cell, cell["value"] == best) for cell in cells)
                    + _cell(found["gain"]["auroc"], False, sign=True) + "</tr>")
    note = ("AUROC: how often a wrong answer is trusted less than a right one. Small figures are 95 % bootstrap "
            f"intervals over pictures. In domain: {' and '.join(IN_DOMAIN)}; all else is shifted, and the last three "
            "changes of the picture were shown to no training.")
    return f'<h2>At a glance</h2><p class="note">{note}</p>{_table(heads, rows)}'


def _set(name, found):
    judges = found["judges"]
    rows = []
    for judge, cells in judges.items():
        marks = "".join(_cell(cells[measure], _is_best(measure, judge, judges), digits=4 if "aurc" in measure else 3)
                        for measure in SHOWN)
        rows.append(f'<tr class="{"monitor" if judge == "monitor" else ""}"><th>{judge}</th>{marks}</tr>')
    curves = found["curves"]
    risk = {judge: tuple([100 * x for x in curves[judge][part]] for part in ("coverage", "risk")) for judge in JUDGES}
    top = max(1, *(y for _, ys in risk.values() for y in ys))
    bins = {judge: ([b[1] for b in curves[judge]["bins"]], [b[2] for b in curves[judge]["bins"]])
            for judge in ("monitor", "max-softmax")}
    charts = [line_chart(risk, title="Risk of what is answered", x_label="% of the questions answered",
                         y_label="% wrong among them", y_range=(0, top), size=CHART),
              line_chart({**bins, "calibrated": ([0, 1], [0, 1])}, title="Reliability", x_label="confidence",
                         y_label="right", y_range=(0, 1), size=CHART)]
    note = (f"{found['questions']:,} questions about {found['pictures']:,} pictures, {found['wrong']:.1%} "
            "answered wrong.")
    return (f'<h2>{html.escape(name)}</h2><p class="note">{note}</p><div class="charts">{"".join(charts)}</div>'
            + _table(["", *(MEASURES[measure] for measure in SHOWN)], rows))


def _is_best(measure, judge, judges):
    values = [cells[measure]["value"] for cells in judges.values() if cells[measure]["value"] is not None]
    own = judges[judge][measure]["value"]
    return own is not None and own == (max if measure in HIGH_IS_GOOD else min)(values)


def _cell(cell, best, sign=False, digits=3):
    if cell["value"] is None:
        return "<td>–</td>"
    form = f"{'+' if sign else ''}.{digits}f"
    span = "" if cell["low"] is None else f"<small>{cell['low']:{form}} to {cell['high']:{form}}</small>"
    return f'<td class="{"best" if best else ""}">{cell["value"]:{form}}{span}</td>'


def _table(heads, rows):
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
