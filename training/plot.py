"""Line charts as SVG text: what a training or an example draws of its numbers, with nothing installed."""

import math
from html import escape

from training.progress import TIMINGS, read_metrics
from xuracore.errors import ConfigError
from xuracore.io.atomic import write_atomically

COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#e08e0b", "#7b4ea3", "#4a4a4a", "#0097a7", "#a0522d")
DASHES = ("", "6 3", "2 2", "8 3 2 3")
MARGIN = {"left": 62, "top": 40, "bottom": 48}
LINE_HEIGHT, LETTER_WIDTH = 18, 7.5  # of the legend
TICKS = 5


def line_chart(series, *, title="", x_label="", y_label="", y_range=None, log_x=False, size=(760, 400),
               legend=None):
    """One chart of several lines.

    series : {name: (xs, ys)}, finite or not; a value that is not finite breaks its line.
    y_range : (lowest, highest) of the vertical axis; by default what the values span.
    log_x : a logarithmic horizontal axis (positive values).   legend : pixels for the names of the lines.
    Returns the text of an SVG file of ``size`` pixels.  Raises ConfigError if nothing can be drawn.
    """
    lines = {name: _points(name, *values) for name, values in series.items()}
    finite = [point for points in lines.values() for point in points if _drawable(point, log_x)]
    if not finite:
        raise ConfigError(f"line_chart {title!r}: no finite point in {list(series)}")
    legend = legend_width(series) if legend is None else legend
    right = max(size[0] - legend, size[0] / 2)
    across = _Axis([x for x, _ in finite], MARGIN["left"], right, log=log_x)
    up = _Axis([y for _, y in finite] if y_range is None else y_range, size[1] - MARGIN["bottom"], MARGIN["top"])
    parts = [_frame(size, right, title, x_label, y_label), *_grid(across, up)]
    for number, (name, points) in enumerate(lines.items()):
        style = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2" fill="none"'
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        style += f' stroke-dasharray="{dash}"' if dash else ""
        for run in _unbroken(points, log_x):
            parts.append(_polyline([(across.at(x), up.at(y)) for x, y in run], style))
        x, y = right + 12, MARGIN["top"] + 8 + number * LINE_HEIGHT
        parts.append(_polyline([(x, y), (x + 22, y)], style))
        parts.append(_text(x + 28, y + 4, name))
    return "\n".join([*parts, "</svg>", ""])


def legend_width(names):
    """Pixels that the longest of ``names`` takes beside its sample of line."""
    return 48 + LETTER_WIDTH * max(map(len, map(str, names)))


def draw_training(log, target):
    """Draw a run's ``metrics.jsonl`` as an SVG file: the loss, the shares (from 0 to 1), the rate.

    Writes nothing where the log holds no number yet.
    """
    chart = training_chart(read_metrics(log))
    if chart:
        write_atomically(target, [chart.encode()])


def training_chart(records):
    """The SVG text of :func:`draw_training` for records of a metrics file, "" where there is nothing to draw."""
    lines = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in ("step", "skipped", *TIMINGS):
                label = f"validation {name}" if record.get("split") == "validation" else name
                xs, ys = lines.setdefault(label, ([], []))
                xs.append(record["step"])
                ys.append(value)
    losses = {name: line for name, line in lines.items() if name.split()[-1] == "loss"}
    rates = {}
    if "lr" in lines:
        steps, values = lines["lr"]
        peak = max(values)
        rates[f"of {peak:.3g}"] = steps, [value / peak if peak else 0.0 for value in values]
    shares = {name: line for name, line in lines.items() if name not in {*losses, "lr", "grad_norm"}
              and all(0 <= value <= 1 for value in line[1])}
    first = sorted(shares, key=lambda name: name.split()[-1] != "all")  # the sum before its parts
    shares = {name: shares[name] for name in shares if name in first[: len(COLOURS)]}
    panels = [("loss", losses, None), ("share", shares, (0, 1)), ("learning rate", rates, (0, 1))]
    width, height, parts = 900, 300, []
    legend = legend_width([*losses, *shares, *rates, ""])  # one for all, so that steps stand below each other
    for label, series, span in panels:
        if series:
            chart = line_chart(series, x_label="step", y_label=label, y_range=span, size=(width, height), legend=legend)
            parts.append(chart.replace("<svg ", f'<svg y="{len(parts) * height}" ', 1))
    if not parts:
        return ""
    total = len(parts) * height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}">'
    return "\n".join([head, *parts, "</svg>", ""])


def _points(name, xs, ys):
    points = [(float(x), float(y)) for x, y in zip(xs, ys)]
    if len(xs) != len(ys):
        raise ConfigError(f"line_chart: {name!r} has {len(xs)} values across and {len(ys)} up; expected as many")
    return points


def _drawable(point, log_x):
    return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[0] > 0 or not log_x)


def _unbroken(points, log_x):
    run = []
    for point in points:
        if _drawable(point, log_x):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


class _Axis:
    """From values to pixels, and the round values at which to write a number."""

    def __init__(self, values, start, stop, log=False):
        low, high = min(values), max(values)
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def at(self, value):
        value = math.log10(value) if self.log else value
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.stop - self.start)

    def ticks(self):
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            factors = (1, 2, 5) if self.high - self.low < 3 else (1,)
            values = [factor * 10.0**power for power in powers for factor in factors]
            inside = [value for value in values if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]
            return inside or [10**self.low, 10**self.high]
        rough = (self.high - self.low) / TICKS
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _grid(across, up):
    for value in up.ticks():
        y = up.at(value)
        yield f'<line x1="{across.start}" x2="{across.stop}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
        yield _text(across.start - 8, y + 4, f"{value:.6g}", "end")
    for value in across.ticks():
        x = across.at(value)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up.start}" y2="{up.start + 5}" stroke="#333333"/>'
        yield _text(x, up.start + 19, f"{value:.6g}", "middle")
    yield _polyline(
        [(across.start, up.stop), (across.start, up.start), (across.stop, up.start)], 'stroke="#333333" fill="none"'
    )


def _frame(size, right, title, x_label, y_label):
    width, height = size
    middle = (MARGIN["left"] + right) / 2
    centre = (MARGIN["top"] + height - MARGIN["bottom"]) / 2
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13" fill="#222222">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(middle, 24, title, "middle", 'font-size="15" font-weight="bold"'),
        _text(middle, height - 10, x_label, "middle"),
        _text(0, 0, y_label, "middle", f'transform="translate(16 {centre:.1f}) rotate(-90)"'),
    ])  # fmt: skip


def _text(x, y, text, anchor="start", style=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(str(text))}</text>'


def _polyline(points, style):
    if len(points) == 1:  # a single value is still worth a mark
        points = [(points[0][0] - 2, points[0][1]), (points[0][0] + 2, points[0][1])]
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {style}/>'
