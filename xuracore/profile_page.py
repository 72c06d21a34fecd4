"""The picture of a profile, as SVG: modules and ops over time, memory under them, and each module's share.

Everything is drawn from :class:`xuracore.profiler.profile`; a rectangle tells more when pointed at.
"""

from collections import Counter
from html import escape

WIDTH, LEFT, RIGHT, ROW = 1180, 16, 16, 22
PLOT = WIDTH - LEFT - RIGHT
PALETTE = ("#4477aa", "#ee8866", "#44aa99", "#bb5577", "#998833", "#6655aa", "#77aadd", "#aaaa00")
OP_FORWARD, OP_BACKWARD, INK, PALE = "#8a94a0", "#b9c0c8", "#20242a", "#6b7480"
SMALLEST = 0.35  # pixels: narrower rectangles are left out
CHARACTER = 6.3  # pixels of one, at the size of the labels

STYLE = """
text { font: 11px 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #20242a }
.h { font-size: 14px; font-weight: bold } .pale { fill: #6b7480 } .in { fill: #fff }
rect:hover { stroke: #000; stroke-width: 1 }
"""


def spans(profile):
    """[(depth, start, end, label, details, kind, path)] of the thread that did most, and (start, end, phase)s."""
    ops = [e for e in profile.events if e.kind in ("forward", "backward")]
    if not ops:
        return [], []
    thread = Counter(e.thread for e in ops).most_common(1)[0][0]
    events = sorted((e for e in profile.events if e.thread == thread), key=lambda e: (e.start, -e.end))
    called = {e.path for e in events if e.kind == "module"}
    found, phases, open_modules, back, op_end = [], [], [], [], 0

    def close_back(depth):
        while len(back) > depth:
            path, start, end = back.pop()
            found.append((len(back), start, end, _label(path), path, "module backward", path))

    for event in events:
        took = f"{(event.end - event.start) / 1e6:.3f} ms"
        if event.kind in ("kernel", "compile"):
            if event.start >= op_end:  # no part of an op: an optimizer's
                close_back(0)
                details = f"{event.kind} {event.name}, {took}"
                found.append((0, event.start, event.end, event.name, details, "op", event.path))
            continue
        if event.kind != "module":
            op_end = event.end
        if event.kind == "backward":
            chain = _chain(event.path, called)
            same = 0
            while same < min(len(chain), len(back)) and back[same][0] == chain[same]:
                same += 1
            close_back(same)
            back += [[path, event.start, event.end] for path in chain[same:]]
            for span in back:
                span[2] = event.end
            label, depth = f"{event.name} backward", len(back)
            found.append((depth, event.start, event.end, label, f"{label}, {took}", "op backward", event.path))
        else:
            close_back(0)
            while open_modules and open_modules[-1].end <= event.start:
                open_modules.pop()
            depth = len(open_modules)
            if event.kind == "module":
                open_modules.append(event)
                details = f"{event.path}: {event.name}, {took}"
                found.append((depth, event.start, event.end, _label(event.path), details, "module", event.path))
            else:
                details = f"{event.name}, {took}, {event.size / 1e6:.2f} MB made"
                found.append((depth, event.start, event.end, event.name, details, "op", event.path))
        phase = "backward" if event.kind == "backward" else "forward"
        if phases and phases[-1][2] == phase and event.start - phases[-1][1] < 0.02 * profile.seconds * 1e9:
            phases[-1][1] = max(phases[-1][1], event.end)
        else:
            phases.append([event.start, event.end, phase])
    close_back(0)
    return found, [tuple(phase) for phase in phases]


def _chain(path, called):
    """The called modules on the way to ``path``, outermost first."""
    parts = path.split(".")
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return [prefix for prefix in prefixes if prefix in called]


def _label(path):
    """The end of a path; a number keeps the name before it."""
    *_, above, last = ["", "", *path.split(".")]
    return f"{above}.{last}" if last.isdigit() and above else last


def svg(profile):
    """The picture as one SVG element."""
    drawn, phases = spans(profile)
    total = max([profile.seconds * 1e9, 1.0, *(s[2] for s in drawn)])
    colors, shapes, y = {}, [], 24
    title = f"{profile.name}: {profile.seconds * 1e3:.1f} ms, {profile.peak / 1e6:.1f} MB at most in arrays of ops"
    shapes.append(_text(LEFT, y, title, "h"))
    y += 26
    shapes.append(_text(LEFT, y, "modules, and ops under them, over time", "pale"))
    y += 8
    for start, end, phase in phases:
        x, width = _x(start, total), max(1.0, _x(end, total) - _x(start, total))
        shapes.append(_rect(x, y, width, 14, "#3b4654" if phase == "forward" else "#9aa5b1", phase))
        if width > CHARACTER * len(phase) + 6:
            shapes.append(_text(x + 4, y + 11, phase, "in" if phase == "forward" else ""))
    y += 18
    hidden = 0
    for depth, start, end, label, details, kind, path in drawn:
        x, width = _x(start, total), _x(end, total) - _x(start, total)
        if width < SMALLEST:
            hidden += 1
            continue
        if kind.startswith("op"):
            fill, opacity = (OP_FORWARD if kind == "op" else OP_BACKWARD), 1
        else:
            fill, opacity = _color(path, colors), 1 if kind == "module" else 0.6
        top = y + depth * ROW
        shapes.append(_rect(x, top, width, ROW - 2, fill, details, opacity))
        fits = int((width - 6) / CHARACTER)
        if fits >= min(3, len(label)):
            short = label if len(label) <= fits else label[: fits - 1] + "…"
            shapes.append(_text(x + 3, top + 14, short, "" if "backward" in kind else "in"))
    y += (max((s[0] for s in drawn), default=0) + 1) * ROW + 4
    shapes += _axis(y, total)
    if hidden:
        shapes.append(_text(WIDTH - RIGHT, y + 28, f"{hidden} spans too narrow to draw", "pale", "end"))
    y += 46
    part, y = _memory(profile, total, y)
    shapes += part
    part, y = _shares(profile, colors, y + 18)
    shapes += part
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" width="{WIDTH}" height="{y + 8}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def html(profile):
    """A page with the picture and the table of ops."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(profile.name)}</title>'
        "<style>body{margin:24px;font:13px 'DejaVu Sans',Helvetica,Arial,sans-serif;color:#20242a;background:#fff}"
        "svg{max-width:100%;height:auto}pre{font:12px 'DejaVu Sans Mono',monospace;overflow-x:auto}</style>"
        f"<body>{svg(profile)}<pre>{escape(profile.table())}</pre></body></html>\n"
    )


def _memory(profile, total, y):
    """Bytes alive over time, on the same axis as the modules."""
    height, peak = 110, max(profile.peak, 1)
    shapes = [_text(LEFT, y, "memory of the arrays that ops made and that are still alive", "pale")]
    top = y + 10
    base = top + height
    steps, last = [f"M{LEFT} {base}"], base
    samples = _thinned(profile.memory, total)
    for time, live in samples:
        x, level = _x(time, total), base - height * live / peak
        steps.append(f"L{x:.1f} {last:.1f}L{x:.1f} {level:.1f}")
        last = level
    steps.append(f"L{LEFT + PLOT} {last:.1f}L{LEFT + PLOT} {base}Z")
    shapes.append(f'<path d="{"".join(steps)}" fill="#77aadd" fill-opacity="0.55" stroke="#4477aa"/>')
    shapes.append(f'<path d="M{LEFT} {base}H{LEFT + PLOT}" stroke="{PALE}"/>')
    if samples:
        time, live = max(samples, key=lambda sample: sample[1])
        x = _x(time, total)
        side, anchor = (8, "start") if x < WIDTH * 0.8 else (-8, "end")
        shapes.append(f'<circle cx="{x:.1f}" cy="{top:.1f}" r="3" fill="{INK}"/>')
        shapes.append(_text(x + side, top + 4, f"{live / 1e6:.2f} MB at {time / 1e6:.2f} ms", "", anchor))
    return shapes, base + 8


def _thinned(memory, total):
    """Not more than a highest and a last value per pixel."""
    kept = []
    for time, live in memory:
        pixel = int(_x(time, total))
        if kept and int(_x(kept[-1][0], total)) == pixel and len(kept) > 1 and int(_x(kept[-2][0], total)) == pixel:
            if live > kept[-2][1]:
                kept[-2] = kept[-1] = (time, live)
            kept[-1] = (time, live)
        else:
            kept.append((time, live))
    return kept


def _shares(profile, colors, y, most=18):
    """A bar for each module: forward, then backward."""
    modules = profile.by_module()
    if not modules:
        return [], y
    largest = max(sum(times) for times in modules.values()) or 1
    chosen = sorted(modules, key=lambda path: -sum(modules[path]))[:most]
    shapes = [_text(LEFT, y, "time of each module with all below it: forward, then backward (lighter)", "pale")]
    y += 8
    names = LEFT + 300
    for path in (path for path in modules if path in chosen):
        forward, backward = modules[path]
        indent = 12 * (len(_chain(path, modules)) - 1)
        shapes.append(_text(LEFT + indent, y + 14, _label(path)))
        x, color = names, _color(path, colors)
        for share, opacity in ((forward, 1), (backward, 0.6)):
            width = (PLOT - 300 - 150) * share / largest
            shapes.append(_rect(x, y + 3, width, ROW - 8, color, f"{path}: {share / 1e6:.3f} ms", opacity))
            x += width
        shapes.append(_text(x + 6, y + 14, f"{forward / 1e6:.2f} + {backward / 1e6:.2f} ms", "pale"))
        y += ROW
    if len(modules) > most:
        shapes.append(_text(LEFT, y + 12, f"and {len(modules) - most} modules that took less", "pale"))
        y += ROW
    return shapes, y


def _axis(y, total):
    step = _round_step(total / 8)
    shapes = [f'<path d="M{LEFT} {y}H{LEFT + PLOT}" stroke="{PALE}"/>']
    for i in range(int(total / step) + 1):
        x = _x(i * step, total)
        shapes.append(f'<path d="M{x:.1f} {y}v4" stroke="{PALE}"/>')
        unit = f"{i * step / 1e6:g} ms" if i * step < 1e9 else f"{i * step / 1e9:g} s"
        shapes.append(_text(x, y + 16, unit, "pale", "start" if not i else "middle" if x < WIDTH - 40 else "end"))
    return shapes


def _round_step(step):
    """The next of 1, 2, 5, 10, … above."""
    power = 10.0 ** (len(str(int(step))) - 1)
    return next(n * power for n in (1, 2, 5, 10) if n * power >= step)


def _x(time, total):
    return LEFT + PLOT * time / total


def _color(path, colors):
    """One colour for everything below the same child of the root."""
    parts = path.split(".")
    branch = tuple(parts[1:3] if len(parts) > 2 and parts[2].isdigit() else parts[1:2])
    return colors.setdefault(branch, "#55606c" if not branch else PALETTE[len(colors) % len(PALETTE)])


def _rect(x, y, width, height, fill, title, opacity=1):
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" fill="{fill}" fill-opacity="{opacity}" '
        f'stroke="#fff" stroke-width="0.4"><title>{escape(title)}</title></rect>'
    )


def _text(x, y, text, kind="", anchor="start"):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}" pointer-events="none">'
        f"{escape(text)}</text>"
    )
