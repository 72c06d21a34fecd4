"""A page that shows how well a model answers: numbers beside controls, and pictures of what it got right and wrong.

One file that refers to nothing outside itself: pictures are inlined, bars are boxes, there is no script, and a
content policy forbids the browser to load anything.  All text from data is escaped.  The same results give the same
bytes.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np

from training.eval_style import STYLE
from training.evaluation.tables import COLUMNS, ORDER_SENTENCE, WRITTEN, blind, confidence, short, spread
from training.evaluation.words import NOT_TAUGHT
from training.phases.common import generator, row_picture
from xuravljepa.agent.trace import printable
from xuravljepa.image import read_rgb

CARDS = 24  # of right answers, and as many of wrong ones
PER_TYPE = 3  # wrong answers of a type that are shown before others get a turn
THUMBNAIL = 144  # pixels of the longer side
PICTURE_BYTES = 1_400_000  # of all pictures together, after which cards are left out
TITLES = {"prior": "question only", "shuffled": "shuffled picture", "permuted": "permuted answers",
          "paraphrase": "unseen wording", "ood": "held-out pairs", "corrupt": "corrupted"}


def write_html(path, result, answers=None, cards=None):
    """Write the page of an evaluation.

    Args:
        path: file to write.
        result: the dict that ``xura eval --json`` writes.
        answers: ``Answers`` to the test rows, for the galleries; None leaves them out.
        cards: what ``choose_cards`` chose of them.
    """
    Path(path).write_text(html_page(result, answers, cards), encoding="utf-8", newline="\n")


def html_page(result, answers=None, cards=None):
    """The page as text; see ``write_html``."""
    about = result["about"]
    title = f"How well the model “{_model_name(about['model']['name'])}” answers"
    measured = {name: part for name, part in result.items() if name != "about" and "skipped" not in part}
    sections = [_tiles(measured), _alarms(measured)]
    if "answers" in measured:
        sections += [_types(measured["answers"]), _sort_of_clevr(measured["answers"])]
    if answers is not None:
        sections += _galleries(answers, choose_cards(answers, about["seed"]) if cards is None else cards)
    if "answers" in measured:
        sections.append(_confusion(measured["answers"]["confusion"]))
    sections += [section(measured[name]) for name, section in (("words", _words), ("health", _health))
                 if name in measured]
    small = [section(measured[name]) for name, section in _SMALL.items() if name in measured]
    sections.append(f'<div class="columns">{"".join(small)}</div>' if small else "")
    sections.append(_provenance(about, {name: part["skipped"] for name, part in result.items() if "skipped" in part}))
    body = "\n".join(section for section in sections if section)
    data = about["data"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>{data["questions"]:,} questions about {data["pictures"]:,} pictures: {_text(data["name"])}</p>
</header>
{body}
</body>
</html>
"""


def _model_name(folder):
    """tiny; of runs/jepa/model, jepa."""
    parts = [part for part in Path(folder).parts if part != "model"]
    return parts[-1] if parts else "the model"


def _text(value):
    return html.escape(printable(str(value)), quote=True)


def _percent(cell):
    return f"{100 * cell['value']:.1f}"


def _interval(cell, scale=100, digits=1):
    return f"{scale * cell['low']:.{digits}f} to {scale * cell['high']:.{digits}f}" if "low" in cell else ""


def _section(title, body, note=""):
    said = f'<p class="note">{note}</p>' if note else ""
    return f"<section>\n<h2>{title}</h2>{said}\n{body}\n</section>"


def _table(heads, rows, kind=""):
    """heads: texts.  rows: lists of ready cells, the first of which names the row."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    lines = "\n".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
                      for row in rows)
    head = f"<thead><tr>{top}</tr></thead>"
    return f'<div class="wide"><table class="{kind}">{head}\n<tbody>{lines}</tbody></table></div>'


def _ranged(cell):
    """A share in percent with its interval below."""
    return f"<b>{_percent(cell)}</b><small>{_interval(cell)}</small>"


# ---------------------------------------------------------------------- at a glance
def _tiles(measured):
    found = []

    def add(cell, label, about="", text=None):
        about = about or (f"95 %: {_interval(cell)}" if cell else "")
        shown = text if text is not None else f"{_percent(cell)}<i>%</i>"
        found.append(f'<div class="tile"><strong>{shown}</strong><span>{label}</span><small>{about}</small></div>')

    if "answers" in measured:
        types = measured["answers"]["types"]
        add(types["all"]["accuracy"], "answers right")
        for kind in ("non-relational", "relational"):
            if kind in types:
                add(types[kind]["accuracy"], f"{kind}")
        for column in ("prior", "shuffled", "ood"):
            if column in types["all"]:
                add(types["all"][column], {"prior": "without looking", "shuffled": "shown another picture",
                                           "ood": "pairs never seen together"}[column])
    if "classes" in measured:
        add(measured["classes"]["top1"], "classified by name")
    if "retrieval" in measured:
        add(measured["retrieval"]["to_caption"]["recall_at_1"], "captions found first")
    if "all" in measured.get("doubt", ()):
        add(None, "AUROC of its doubt", f"max-softmax {measured['doubt']['all']['max_softmax']['auroc']:.3f}",
            f"{measured['doubt']['all']['monitor']['auroc']:.3f}")
    return f'<div class="tiles">{"".join(found)}</div>' if found else ""


def _alarms(measured):
    found = measured.get("answers", {}).get("blind", [])
    alarms = [blind(found)] if found else []
    alarms = [text[:1].upper() + text[1:] for text in alarms + measured.get("health", {}).get("alarms", [])]
    if alarms or "health" not in measured:
        return "".join(f'<p class="alarm"><b>Alarm</b> {_text(alarm)}.</p>' for alarm in alarms)
    rank = measured["health"]["predictor"]
    return (f'<p class="well"><b>No alarm</b> The predicted embeddings span {rank["rank"]["value"]:.1f} of '
            f'{rank["dimensions"]} dimensions; their mean cosine is {rank["cosine"]["value"]:.2f}.</p>')


# ---------------------------------------------------------------------- answers
def _types(found):
    columns = [name for name in COLUMNS[1:] if any(name in cells for cells in found["types"].values())]
    rows = []
    for kind, cells in found["types"].items():
        name = _text(short(kind.replace("_", " ")))
        name = f"<b>{name}</b>" if kind in ("all", "relational", "non-relational") else name
        rows.append([f"{name}<small>{cells['accuracy']['count']:,}</small>", _bar(cells), _ranged(cells["accuracy"]),
                     *(_percent(cells[column]) if column in cells else "" for column in columns)])
    legend = ('<p class="legend"><span class="key"><i class="swatch"></i>right</span>'
              '<span class="key"><i class="line"></i>95 % interval</span>'
              '<span class="key"><i class="tick prior"></i>question only</span>'
              '<span class="key"><i class="tick shuffled"></i>shuffled picture</span></p>')
    heads = ["type of question", "", "right, %", *(TITLES[column] for column in columns)]
    notes = [f"{ORDER_SENTENCE}: {100 * found['controls']['reordered']:.2f} %."]
    notes.append(f"{confidence(found['confidence'])}.")
    if found["unknown"]:
        notes.append(f"{found['unknown']} questions have an answer the model was never taught.")
    return _section("Answers by type of question", legend + _table(heads, rows, "types"), " ".join(notes))


def _bar(cells):
    def place(cell, kind):
        return f'<i class="tick {kind}" style="left:{100 * cell["value"]:.1f}%"></i>'

    right = cells["accuracy"]
    ticks = "".join(place(cells[kind], kind) for kind in ("prior", "shuffled") if kind in cells)
    low, high = 100 * right["low"], 100 * right["high"]
    return (f'<div class="bar" role="img" aria-label="{_percent(right)} % right">'
            f'<span style="width:{100 * right["value"]:.1f}%"></span>{ticks}'
            f'<em style="left:{low:.1f}%;width:{max(high - low, 0.4):.1f}%"></em></div>')


def _sort_of_clevr(found):
    if "sort_of_clevr" not in found:
        return ""
    rows = []
    for name, row in found["sort_of_clevr"].items():
        if name != "note":
            asks = _text(row["asks"])
            rows.append([f"<b>{asks}</b>" if asks.startswith("all ") else asks, _ranged(row["accuracy"]),
                         *(_percent(row[column]) if column in row else "" for column in ("prior", "shuffled")),
                         _ranged(row["ood"]) if "ood" in row else ""])
    heads = ["subtype", "right, %", "question only", "shuffled picture", "held-out combinations"]
    return _section("The questions of Sort-of-CLEVR", _table(heads, rows), _text(found["sort_of_clevr"]["note"]))


def _confusion(found):
    top = "".join(f'<th scope="col">{_text(name)}</th>' for name in found["said"])
    lines = []
    for i, (name, counts) in enumerate(zip(found["answers"], found["counts"])):
        total, cells = max(sum(counts), 1), []
        for j, count in enumerate(counts):
            share = count / total
            kind = "right" if i == j else "wrong"
            shown = f"{100 * share:.0f}" if share >= 0.005 else "·" if count else ""
            style = f' style="background:rgb(var(--{kind}) / {0.08 + 0.62 * share:.2f})"' if count else ""
            cells.append(f'<td{style} title="{count} of {total}">{shown}</td>')
        lines.append(f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}<td class="n">{total:,}</td></tr>')
    table = (f'<div class="wide"><table class="confusion"><thead><tr><th></th>{top}<th>questions</th></tr></thead>\n'
             f'<tbody>{"".join(lines)}</tbody></table></div>')
    return _section("What is said for what", table, "Rows: the right answer, the commonest ones. Columns: what was "
                    "said, in percent of the row; · is less than half a percent.")


# ---------------------------------------------------------------------- galleries
def choose_cards(answers, seed):
    """{"wrong": indices, the surest first; "right": indices, drawn at random}, ``CARDS`` of each at most."""
    order = generator(seed, 31).permutation(len(answers.rows))
    wrong = sorted((int(i) for i in order if answers.right[i] < 0.5), key=lambda i: -answers.confidence[i])
    right = [int(i) for i in order if answers.right[i] >= 0.5]
    return {"wrong": _varied(wrong, answers, PER_TYPE)[:CARDS], "right": _varied(right, answers, 1)[:CARDS]}


def _galleries(answers, cards):
    budget, result, wrong = [PICTURE_BYTES], [], int((answers.right < 0.5).sum())
    for kind, title, total, note in (
            ("wrong", "Wrong answers", wrong,
             f"The surest mistakes first, {PER_TYPE} of a type before others get a turn."),
            ("right", "Right answers", len(answers.rows) - wrong, "Drawn at random, every type in turn.")):
        shown = [card for i in cards.get(kind, ()) if (card := _card(answers, i, kind, budget))]
        if shown:
            result.append(_section(title, f'<div class="cards">{"".join(shown)}</div>',
                                   f"{len(shown)} of {total:,}. {note}"))
    return result


def _varied(indices, answers, turn):
    """The indices, at most ``turn`` of a type at a time, else in their order."""
    waiting = {}
    for i in indices:
        waiting.setdefault(answers.rows[i].type, []).append(i)
    result, queues = [], list(waiting.values())
    while queues:
        result += [i for queue in queues for i in queue[:turn]]
        queues = [queue[turn:] for queue in queues if len(queue) > turn]
    return result


def _card(answers, i, kind, budget):
    row = answers.rows[i]
    data, (width, height) = thumbnail(row_picture(row))
    if len(data) > budget[0]:
        return ""
    budget[0] -= len(data)
    expected = "" if kind == "right" else f'<span class="expected">it is <b>{_text(short(row.answer, 80))}</b></span>'
    sure = f"{100 * answers.confidence[i]:.0f} % sure"
    return (f'<figure class="{kind}"><img src="{data}" alt="picture {_text(short(row.id))}" width="{width}" '
            f'height="{height}"><figcaption><span class="asked">{_text(short(row.query, 80))}</span>'
            f'<span class="said"><b>{_text(short(answers.said[i], 80))}</b> <small>{sure}</small></span>{expected}'
            f"</figcaption></figure>")


def thumbnail(source):
    """(a data URI of a PNG, (width, height)) of a picture, at most ``THUMBNAIL`` pixels wide and high."""
    image = read_rgb(source)
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image = image.quantize(128)  # a photograph as PNG is large
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode(), image.size


# ---------------------------------------------------------------------- the other jobs
def _classes(found):
    rows = [[f"mean of {len(found['templates'])} templates", _ranged(found["top1"])],
            ["the name alone", _ranged(found["plain"])]]
    if found["top5"]:
        rows.append(["among the first five", _ranged(found["top5"])])
    if "unseen_top1" in found:
        rows.append([f"the {len(found['unseen'])} names never taught", _ranged(found["unseen_top1"])])
    rows += [["commonest class", f"{100 * found['majority']:.1f}"], ["chance", f"{100 * found['chance']:.1f}"]]
    names = ", ".join(found["names"][:40]) + ("…" if len(found["names"]) > 40 else "")
    return _section("Classes by name alone", _table(["", "right, %"], rows),
                    f"{len(found['names'])} classes, {found['questions']:,} questions: {_text(names)}.")


def _retrieval(found):
    rows = []
    for way, title in (("to_caption", "picture to caption"), ("to_picture", "caption to picture")):
        row = found[way]
        rows.append([title, *(_ranged(row[f"recall_at_{k}"]) for k in (1, 5, 10)),
                     *(f"{row[f'{kind}_rank']['value']:.1f}<small>{_interval(row[f'{kind}_rank'], 1)}</small>"
                       for kind in ("median", "mean"))])
        rows.append(["by chance", *(f"{100 * row['chance'][str(k)]:.1f}" for k in (1, 5, 10)), "", ""])
    note = f"{found['pictures']:,} pictures, {found['captions']:,} different captions."
    if found["too_long"]:
        note += f" {found['too_long']:,} captions are longer than the Y-Encoder reads, and were left out."
    return _section("Retrieval", _table(["", "R@1", "R@5", "R@10", "median rank", "mean rank"], rows), note)


def _words(found):
    parts, note, texts = [], "", {kind: row for kind, row in found["texts"].items() if kind != "skipped"}
    if "answers" in found:
        rows = [["a right answer", _ranged(found["answers"]["exact"])],
                ["the nearest answer", _ranged(found["answers"]["nearest"])]]
        parts.append(_table(["the decoder writes", "%"], rows))
    if texts:
        present = [name for name in WRITTEN if any(name in row["own"] for row in texts.values())]
        rows, examples = [], []
        for kind, row in texts.items():
            name = f"<b>{_text(short(kind.replace('_', ' ')))}</b>"
            for title, cells in ((name, row["own"]), ("held against another picture's", row["other"])):
                rows.append([title, *(_written(measure, cells[measure]) if measure in cells else ""
                                      for measure in present)])
            examples += [["" if i else name, _text(short(pair["written"], 120)), _text(short(pair["caption"], 120))]
                         for i, pair in enumerate(row["examples"][:2])]
        parts += [_table(["text", *(WRITTEN[measure] for measure in present)], rows),
                  _table(["", "written", "expected"], examples, "texts")]
        untaught = ", ".join(kind.replace("_", " ") for kind, row in texts.items() if "note" in row)
        note = f"{untaught}: {NOT_TAUGHT}" if untaught else ""
    else:
        note = f"Captions: {found['texts']['skipped']}."
    return _section("What the decoder writes", "\n".join(parts), _text(note[:1].upper() + note[1:]))


def _written(measure, cell):
    shown, scale, digits = (f"{cell['value']:.2f}", 1, 2) if measure == "cider" else (_percent(cell), 100, 1)
    return f"<b>{shown}</b><small>{_interval(cell, scale, digits)}</small>"


def _health(found):
    rows = []
    for space, title in (("predictor", "predicted embeddings"), ("y_encoder", "embeddings of the answers"),
                         ("x_encoder", "pictures, mean token")):
        row = found[space]
        low, middle, high = row["deviation"]
        rows.append([title, f"<b>{row['rank']['value']:.1f}</b> of {row['dimensions']}"
                     f"<small>{_interval(row['rank'], 1)}</small>",
                     f"<b>{row['cosine']['value']:.3f}</b><small>{_interval(row['cosine'], 1, 3)}</small>",
                     f"<b>{row['uniformity']['value']:.2f}</b><small>{_interval(row['uniformity'], 1, 2)}</small>",
                     f"{middle:.2f}<small>{low:.2f} to {high:.2f}</small>", row["dead"]])
    heads = ["", "effective rank", "mean cosine", "uniformity", "deviation · √D", "dead dimensions"]
    note = (f"Squared distance of a prediction to its right answer: {spread(found['alignment'], 3)}. An alarm is "
            f"raised below an effective rank of 5 % of the dimensions, and above a mean cosine of 0.95.")
    return _section("Health of the embeddings", _table(heads, rows), note)


def _doubt(found):
    rows = []
    for name, title in (("all", "all questions"), ("plain", "about the picture"), ("tool", "that need a tool")):
        part = found.get(name)
        if part is None:  # nothing there is wrong, or nothing right
            continue
        for judge, who in (("monitor", "monitor"), ("max_softmax", "largest softmax")):
            values = part[judge]
            rows.append([f"{title}<small>{who}</small>", f"{100 * part['wrong']:.1f}", f"{values['auroc']:.3f}",
                         f"{values['ece']:.3f}", f"{100 * values['coverage_at_1_percent_risk']:.1f}"])
    heads = ["questions", "wrong, %", "AUROC", "calibration error", "answered at 1 % risk, %"]
    strange = 100 * found["strange_pictures_called_unsure"]
    return _section("Knowing when it is wrong", _table(heads, rows),
                    f"{found['questions']:,} questions, {100 * found['wrong']:.1f} % answered wrongly. Of 200 strange "
                    f"pictures, {strange:.1f} % are called unsure.")


def _tools(found):
    kinds = ("without_tools", "gated", "always", "oracle_gate", "calls", "harm")
    rows = [[title, *(f"{100 * found[name][kind]:.1f}" for kind in kinds)]
            for name, title in (("all", "all keys"), ("known", "known keys"), ("unseen", "unseen keys"))]
    heads = ["", "without tools", "gated by doubt", "always", "oracle's gate", "calls", "right made wrong"]
    note = f"{found['questions']:,} questions, in percent."
    return _section("Questions that need a tool", _table(heads, rows), note)


def _injection(found):
    rows = [["told nothing", f"{100 * found['without']:.1f}"],
            ["the result read as text", f"{100 * found['token']:.1f}"],
            [f"injected ({_text(found['mode'])})", f"<b>{100 * found['accuracy']:.1f}</b>"]]
    note = (f"The injection explains {100 * found['explained_variance']:.1f} % of the change that reading makes to "
            f"the state." if "explained_variance" in found else "")
    return _section("Taking in what a tool said", _table(["", "right, %"], rows), note)


def _provenance(about, skipped):
    data, model = about["data"], about["model"]
    rows = [["command", f"<code>{_text(about['command'])}</code>"],
            ["model", f"{_text(model['name'])}<small>SHA-256 {model.get('model_sha256', 'none: random')}</small>"],
            *([["its agent", f"<small>SHA-256 {model['agent_sha256']}</small>"]] if "agent_sha256" in model else []),
            ["data", f"{_text(data['name'])}<small>SHA-256 {data['sha256']}</small>"],
            ["versions", ", ".join(f"{name} {_text(version)}" for name, version in about["versions"].items())],
            ["intervals", f"95 %, from {about['resamples']:,} resamples of whole pictures (seed {about['seed']}): "
             "questions about one picture stand and fall together. Where all are right, Wilson's interval over "
             "pictures; for the embeddings, a jackknife over tenths of the pictures."]]
    rows += [["note", _text(note)] for note in data["notes"]]
    rows += [["not measured", f"{_text(job)}: {_text(why)}"] for job, why in skipped.items()]
    lines = "\n".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return _section("How this was measured", f'<table class="facts"><tbody>{lines}</tbody></table>')


_SMALL = {"classes": _classes, "retrieval": _retrieval, "doubt": _doubt, "tools": _tools,
          "injection": _injection}
