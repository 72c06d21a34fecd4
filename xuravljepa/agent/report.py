"""A page that shows what the agent saw, answered, doubted and did.

One file that refers to nothing outside itself: pictures are inlined, diagrams are SVG, there is no script,
and a content policy forbids the browser to load anything.  All text from traces is escaped.
"""

import base64
import html
import io
from pathlib import Path

from xuravljepa.agent.story import BARS, LABELS, WORDS, percent, picture_to_show, tell, verdict
from xuravljepa.agent.trace import printable


def write_html(path, scenes, title="Xura: what it saw, what it said, and why"):
    """Write the page.

    Args:
        path: file to write.
        scenes: ``story.Scene``s: pictures with their traces.
        title: heading of the page.
    """
    Path(path).write_text(html_page(scenes, title), encoding="utf-8", newline="\n")


def html_page(scenes, title="Xura: what it saw, what it said, and why"):
    """The page as text; see ``write_html``."""
    title = html.escape(printable(title))
    body = "\n".join(_scene(scene) for scene in scenes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _scene(scene):
    image = picture_to_show(scene.image)
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    words = html.escape(printable(scene.caption), quote=True)
    caption = f"<figcaption>{words}</figcaption>" if words else ""
    cards = "\n".join(_card(tell(trace)) for trace in scene.traces)
    alt = words or "the picture that was asked about"
    return f"""<section class="scene">
<figure class="picture">
<img src="{source}" alt="{alt}" width="{image.width}" height="{image.height}">{caption}
</figure>
<div class="cards">
{cards}
</div>
</section>"""


def _card(story):
    mark = ""
    if story.right is not None:
        said = "right" if story.right else f"wrong: it is “{html.escape(story.expected)}”"
        mark = f'<span class="mark {"right" if story.right else "wrong"}">{said}</span>'
    first, last = story.readings[:1], story.readings[1:][-1:]
    diagrams = "".join(_nearest(reading) for reading in first + last)
    steps = ""
    if len(story.events) > 1:
        items = "\n".join(_event(event) for event in story.events)
        steps = f"<ol>\n{items}\n</ol>"
    return f"""<article class="{story.verdict}">
<h2>{html.escape(story.question)}</h2>
<p class="answer"><strong>{html.escape(story.answer)}</strong>
<span class="badge">{percent(story.confidence)} {WORDS[story.verdict]}</span>{mark}</p>
<div class="diagrams">
{_confidence(story.readings)}
{diagrams}
</div>
{steps}
<footer>{html.escape(story.reason)}<span class="about">{html.escape(story.about)}</span></footer>
</article>"""


def _event(event):
    text = html.escape(event.text)
    if event.kind in ("call", "failed"):
        text = f"<code>{text}</code>"
    if event.amount is not None:
        width = 100 * min(event.amount, 1.0)
        text += f' <span class="amount"><span style="width:{width:.1f}%"></span></span>'
    return f'<li class="{event.kind}"><span class="label">{LABELS[event.kind]}</span> {text}</li>'


def _confidence(readings):
    """How sure it was: a gauge for one reading, a line over several."""
    if len(readings) == 1:
        share = readings[0].confidence
        return (f'<figure><figcaption>how sure</figcaption><div class="gauge {verdict(1.0 - share)}">'
                f'<span style="width:{100 * share:.1f}%"></span></div></figure>')
    width, height, left, bottom, top = 190, 110, 34, 22, 12
    inner = height - bottom - top

    def at(i, confidence):
        spread = (width - left - 40) / max(len(readings) - 1, 1)
        return left + 20 + i * spread, top + inner * (1.0 - confidence)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="confidence after each reading">']
    for share in (0.0, 0.5, 1.0):
        y = at(0, share)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 4}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{round(100 * share)}</text>')
    points = [at(i, reading.confidence) for i, reading in enumerate(readings)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{path}"/>')
    for i, (reading, (x, y)) in enumerate(zip(readings, points)):
        kind = verdict(1.0 - reading.confidence)
        below = top + inner + 15
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>'
                     f'{percent(reading.confidence)}</title></circle>'
                     f'<text x="{x:.1f}" y="{below:.1f}" text-anchor="middle">'
                     f'{"picture" if i == 0 else f"tool {i}"}</text>')
    return f'<figure><figcaption>how sure, in %</figcaption>{"".join(parts)}</svg></figure>'


def _nearest(reading):
    """The nearest answers of one reading as bars; the length is the cosine similarity."""
    if not reading.candidates:
        return ""
    rows = []
    for label, similarity in reading.candidates[:BARS]:
        width = 100 * min(max(similarity, 0.0), 1.0)
        chosen = ' class="chosen"' if label == reading.answer else ""
        bar = f'<span style="width:{width:.1f}%"></span>'
        rows.append(f"<tr{chosen}><th>{html.escape(label)}</th><td>{bar}</td><td>{similarity:.2f}</td></tr>")
    return (f'<figure><figcaption>nearest answers{html.escape(reading.title)}</figcaption>'
            f'<table>{"".join(rows)}</table></figure>')


_STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5d6778; --line: #d9dee6; --bar: #4472c4;
  --sure: #1a7f4b; --doubt: #9a6700; --guess: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --card: #1d232d; --ink: #e8ecf2;
  --soft: #9aa6b8; --line: #343d4b; --bar: #7aa2e8; --sure: #4cc38a; --doubt: #e2b340; --guess: #f08a70; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.25rem; font-weight: 600; margin: 0 0 1.25rem; }
h2 { font-size: 1rem; font-weight: 500; color: var(--soft); margin: 0; }
.scene { display: grid; grid-template-columns: 18rem minmax(0, 1fr); gap: 1.5rem; align-items: start;
  margin-bottom: 2rem; }
figure { margin: 0; }
.picture { position: sticky; top: 1rem; }
.picture img { width: 100%; height: auto; border-radius: .5rem; border: 1px solid var(--line);
  image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: .8rem; }
.cards { display: grid; gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-left: .3rem solid var(--sure);
  border-radius: .5rem; padding: .9rem 1.1rem; overflow-wrap: anywhere; }
article.doubt { border-left-color: var(--doubt); }
article.guess { border-left-color: var(--guess); }
.answer { margin: .1rem 0 .7rem; }
.answer strong { font-size: 1.6rem; font-weight: 650; margin-right: .6rem; }
.badge { color: var(--sure); font-weight: 600; }
.doubt .badge { color: var(--doubt); }
.guess .badge { color: var(--guess); }
.mark { display: inline-block; margin-left: .8rem; padding: .1rem .5rem; border: 1px solid;
  border-radius: 1rem; font-size: .8rem; }
.mark.right { color: var(--sure); }
.mark.wrong { color: var(--guess); }
.diagrams { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem 1.5rem; }
svg { width: 100%; max-width: 15rem; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 10px; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--bar); stroke-width: 2; }
svg circle { fill: var(--sure); stroke: var(--card); stroke-width: 1.5; }
svg circle.doubt { fill: var(--doubt); }
svg circle.guess { fill: var(--guess); }
table { width: 100%; border-collapse: collapse; font-size: .85rem; margin-top: .3rem; }
th { font-weight: 400; text-align: left; padding: .1rem .5rem .1rem 0; width: 5rem; }
td:last-child { text-align: right; width: 2.8rem; color: var(--soft); font-variant-numeric: tabular-nums; }
td span, .amount span { display: block; height: .6rem; background: var(--bar); border-radius: .2rem;
  opacity: .45; }
.chosen th { font-weight: 650; }
.chosen td span { opacity: 1; }
ol { list-style: none; margin: .8rem 0 0; padding: .6rem 0 0; border-top: 1px solid var(--line);
  font-size: .9rem; display: grid; gap: .25rem; }
li { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); align-items: baseline; }
li.injected { grid-template-columns: 6.5rem auto minmax(3rem, 1fr); gap: 0; }
.label { color: var(--soft); }
li.failed code, li.note { color: var(--guess); }
code { font: .85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
.gauge { height: .6rem; margin-top: .5rem; background: var(--line); border-radius: .3rem; }
.gauge span { display: block; height: 100%; background: var(--sure); border-radius: .3rem; }
.gauge.doubt span { background: var(--doubt); }
.gauge.guess span { background: var(--guess); }
.amount { display: block; margin-left: .8rem; max-width: 12rem; background: var(--line);
  border-radius: .2rem; }
.amount span { opacity: 1; }
footer { color: var(--soft); font-size: .8rem; margin-top: .7rem; display: flex; flex-wrap: wrap;
  justify-content: space-between; gap: .3rem 1.5rem; }
@media (max-width: 46rem) {
  .scene { grid-template-columns: 1fr; }
  .picture { position: static; max-width: 18rem; }
}
"""
