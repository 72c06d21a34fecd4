"""The story of a page as one PNG, drawn with Pillow alone: for a README or a chat.

Pillow's own font has Latin letters without accents; other letters of an answer are shown as boxes here,
while the page (``report``) shows everything.
"""

import bisect
import functools

from PIL import Image, ImageDraw, ImageFont

from xuravljepa.agent.story import BARS, LABELS, WORDS, percent, picture_to_show, tell, verdict
from xuravljepa.agent.trace import printable

_SCALE = 2  # pixels a unit: sharp on dense screens
_WIDTH = 900  # units of the whole picture
_MARGIN, _GAP, _PAD = 24, 16, 16
_SIDE = 250  # units of a scene's picture
_PAPER, _CARD, _INK, _SOFT, _LINE = "#f6f7f9", "#ffffff", "#1c2330", "#5d6778", "#d9dee6"
_BAR, _PALE = "#4472c4", "#b4c7e7"
_LONGEST = 500  # characters of a text that is drawn
_COLOURS = {"sure": "#1a7f4b", "doubt": "#9a6700", "guess": "#b3402a"}


def write_png(path, scenes, title="Xura: what it saw, what it said, and why"):
    """Draw scenes and save them; see ``draw_scenes``."""
    draw_scenes(scenes, title).save(path, "PNG", optimize=True)


def draw_scenes(scenes, title="Xura: what it saw, what it said, and why"):
    """Draw pictures with the stories of their traces.

    Args:
        scenes: ``story.Scene``s.
        title: heading.

    Returns:
        A PIL image, RGB.
    """
    scenes = [(picture_to_show(scene.image), printable(scene.caption), list(map(tell, scene.traces)))
              for scene in scenes]
    # The same code runs twice: first on a canvas without room, to learn the height that it needs.
    height = _page(_Canvas(1), scenes, printable(title))
    canvas = _Canvas(height)
    _page(canvas, scenes, printable(title))
    return canvas.image


@functools.cache
def _font(size):
    return ImageFont.load_default(size=size * _SCALE)


class _Canvas:
    """Drawing in units, with text that is measured and wrapped."""

    def __init__(self, height):
        self.image = Image.new("RGB", (_WIDTH * _SCALE, max(round(height * _SCALE), 1)), _PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def measure(self, text, size):
        return _font(size).getlength(text) / _SCALE

    def text(self, x, y, text, size=13, fill=_INK, anchor="la", bold=False):
        # The font has one weight; drawn again a pixel further right it looks bold.
        for shift in range(1 + bold * round(size / 12)):
            self.draw.text((x * _SCALE + shift, y * _SCALE), text, fill, _font(size), anchor)

    def box(self, x, y, width, height, fill, radius=0, outline=None):
        if min(width, height) * _SCALE < 1:
            return
        box = [x * _SCALE, y * _SCALE, (x + width) * _SCALE - 1, (y + height) * _SCALE - 1]
        self.draw.rounded_rectangle(box, radius * _SCALE, fill, outline)

    def line(self, points, fill, width=1.0):
        self.draw.line([(x * _SCALE, y * _SCALE) for x, y in points], fill, round(width * _SCALE), "curve")

    def dot(self, x, y, radius, fill):
        box = [(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE]
        self.draw.ellipse(box, fill, _CARD, _SCALE)

    def wrap(self, text, size, width):
        """Lines no wider than ``width``; a word that is wider itself is cut."""
        lines, line = [], ""
        for word in text[:_LONGEST].split(" "):
            while self.measure(word, size) > width and len(word) > 1:
                fit = bisect.bisect_right(range(1, len(word)), width,
                                          key=lambda n: self.measure(word[:n], size)) or 1
                lines += [line, word[:fit]] if line else [word[:fit]]
                line, word = "", word[fit:]
            longer = f"{line} {word}" if line else word
            if line and self.measure(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        return lines + [line]

    def paragraph(self, x, y, text, size, width, fill=_INK, bold=False, most=4):
        """Wrapped text; returns the y below it."""
        lines = self.wrap(text, size, width)
        if len(lines) > most:
            lines = lines[:most - 1] + [lines[most - 1] + " …"]
        for line in lines:
            self.text(x, y, line, size, fill, bold=bold)
            y += size * 1.4
        return y


def _page(canvas, scenes, title):
    """Draw everything; returns the height in units."""
    y = canvas.paragraph(_MARGIN, _MARGIN, title, 18, _WIDTH - 2 * _MARGIN, bold=True) + 10
    for image, caption, stories in scenes:
        y = max(_picture(canvas, image, caption, y), _cards(canvas, stories, y)) + _GAP
    return y + _MARGIN - _GAP


def _picture(canvas, image, caption, y):
    scale = _SIDE * _SCALE / max(image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    shown = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
    canvas.image.paste(shown, (_MARGIN * _SCALE, round(y * _SCALE)))
    height = shown.height / _SCALE
    canvas.box(_MARGIN, y, shown.width / _SCALE, height, None, outline=_LINE)
    if not caption:
        return y + height
    return canvas.paragraph(_MARGIN, y + height + 8, caption, 12, _SIDE, _SOFT)


def _cards(canvas, stories, y):
    x = _MARGIN + _SIDE + _GAP * 1.5
    width = _WIDTH - _MARGIN - x
    for story in stories:
        # A card is drawn over its own background, whose height its content decides.
        height = _card(_Canvas(1), story, x, 0, width)
        canvas.box(x, y, width, height, _CARD, 6, _LINE)
        canvas.box(x, y, 5, height, _COLOURS[story.verdict], 2)
        _card(canvas, story, x, y, width)
        y += height + _GAP
    return y - _GAP if stories else y


def _card(canvas, story, x, y, width):
    """The content of a card; returns its height."""
    top, left, inner = y, x + _PAD + 4, width - 2 * _PAD - 4
    y = canvas.paragraph(left, y + _PAD - 2, story.question, 13, inner, _SOFT) + 4
    y = _answer(canvas, story, left, y, inner)
    diagrams = [reading for reading in (story.readings[:1] + story.readings[1:][-1:]) if reading.candidates]
    column = (inner - _GAP * len(diagrams)) / (1 + len(diagrams))
    several = len(story.readings) > 1
    confidence = _confidence if several else _gauge
    bottoms = [confidence(canvas, story.readings, left, y, column)]
    if not several:  # there is room for the reason below the gauge
        bottoms.append(canvas.paragraph(left, bottoms[0] + 12, story.reason, 11, column, _SOFT))
    for i, reading in enumerate(diagrams):
        bottoms.append(_nearest(canvas, reading, left + (i + 1) * (column + _GAP), y, column))
    y = max(bottoms) + 8
    if len(story.events) > 1:
        canvas.line([(left, y), (left + inner, y)], _LINE, 0.5)
        y += 8
        for event in story.events:
            y = _event(canvas, event, left, y, inner)
        y += 2
    if several and story.reason:
        y = canvas.paragraph(left, y + 2, story.reason, 11, inner, _SOFT)
    return y + _PAD - 6 - top


def _answer(canvas, story, left, y, inner):
    answer = story.answer if len(story.answer) <= 40 else story.answer[:39] + "…"
    words = [(f"{percent(story.confidence)} {WORDS[story.verdict]}", _COLOURS[story.verdict])]
    if story.right is not None:
        words.append(("right", _COLOURS["sure"]) if story.right
                     else (f"wrong, it is “{story.expected[:30]}”", _COLOURS["guess"]))
    canvas.text(left, y, answer, 22, bold=True)
    at = left + canvas.measure(answer, 22) + 16
    for i, (text, colour) in enumerate(words):
        length = canvas.measure(text, 13)
        if at + length + 16 > left + inner:  # no room beside the answer
            at, y = left, y + 28
        if i:
            canvas.box(at, y + 5, length + 16, 21, None, 10, colour)
            canvas.text(at + 8, y + 8, text, 13, colour)
            at += length + 32
        else:
            canvas.text(at, y + 8, text, 13, colour, bold=True)
            at += length + 16
    return y + 38


def _gauge(canvas, readings, x, y, width):
    canvas.text(x, y, "how sure", 11, _SOFT)
    for reading in readings:
        share = reading.confidence
        canvas.box(x, y + 24, width, 9, _LINE, 4)
        canvas.box(x, y + 24, max(width * share, 9), 9, _COLOURS[verdict(1.0 - share)], 4)
    return y + 38


def _confidence(canvas, readings, x, y, width):
    width = min(width, 190)
    canvas.text(x, y, "how sure, in %", 11, _SOFT)
    top, inner, left = y + 24, 62, x + 28
    for share in (0.0, 0.5, 1.0):
        level = top + inner * (1.0 - share)
        canvas.line([(left, level), (x + width, level)], _LINE, 0.5)
        canvas.text(left - 6, level, f"{round(100 * share)}", 10, _SOFT, "rm")
    step = (x + width - left - 44) / (len(readings) - 1)
    points = [(left + 22 + i * step, top + inner * (1.0 - reading.confidence))
              for i, reading in enumerate(readings)]
    canvas.line(points, _BAR, 1.5)
    for i, (reading, point) in enumerate(zip(readings, points)):
        canvas.dot(*point, 4.5, _COLOURS[verdict(1.0 - reading.confidence)])
        canvas.text(point[0], top + inner + 8, "picture" if i == 0 else f"tool {i}", 10, _SOFT, "ma")
    return top + inner + 24


def _nearest(canvas, reading, x, y, width):
    y = canvas.paragraph(x, y, f"nearest answers{reading.title}", 11, width, _SOFT, most=2) + 5
    label_width, number_width = min(72.0, width * 0.4), 30
    bar = width - label_width - number_width - 8
    for label, similarity in reading.candidates[:BARS]:
        chosen = label == reading.answer
        label = label[:40]
        while canvas.measure(label, 12) > label_width - 6 and len(label) > 1:
            label = label[:-2] + "…"
        canvas.text(x, y + 7, label, 12, _INK if chosen else _SOFT, "lm", bold=chosen)
        length = bar * min(max(similarity, 0.0), 1.0)
        canvas.box(x + label_width, y + 2, length, 9, _BAR if chosen else _PALE, 2)
        canvas.text(x + width, y + 7, f"{similarity:.2f}", 11, _SOFT, "rm")
        y += 18
    return y


def _event(canvas, event, x, y, width):
    label_width = 84
    canvas.text(x, y, LABELS[event.kind], 12, _SOFT)
    fill = _COLOURS["guess"] if event.kind in ("failed", "note") else _INK
    if event.amount is not None:
        at = x + label_width + canvas.measure(event.text, 12) + 12
        canvas.box(at, y + 4, 110, 8, _LINE, 2)
        canvas.box(at, y + 4, 110 * min(event.amount, 1.0), 8, _BAR, 2)
    return canvas.paragraph(x + label_width, y, event.text, 12, width - label_width, fill,
                            bold=event.kind == "call") + 1
