"""The results as text for a terminal."""

from training.evaluation.words import NOT_TAUGHT
from xuravljepa.agent.trace import printable

COLUMNS = ("accuracy", "prior", "shuffled", "permuted", "paraphrase", "ood", "corrupt")
WRITTEN = {"exact": "exact", "bleu4": "BLEU-4", "cider": "CIDEr", "objects": "all objects", "precision": "precision",
           "recall": "recall"}
ORDER_SENTENCE = "Answers that another order of the candidates changes"
_TITLES = {"doubt": "Knowing when it is wrong", "tools": "Questions that need a tool",
           "injection": "Taking in what a tool said", "compared": "The same with the other heads"}


def text(result):
    """All that was measured, as lines."""
    parts = [about(result["about"])]
    writers = {"answers": answers, "classes": classes, "retrieval": retrieval, "words": words, "health": health}
    for job, write in writers.items():
        found = result.get(job)
        if found is not None:
            missing = f"{job.capitalize()}: not measured, {found.get('skipped')}"
            parts.append(missing if "skipped" in found else write(found))
    parts += [f"{_TITLES[job]}\n{numbers(result[job], '  ')}" for job in _TITLES if job in result]
    return "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))


def short(name, most=40):
    """The beginning of a name that somebody else chose."""
    return name if len(name) <= most else name[: most - 1] + "…"


def percent(cell):
    """"97.4 [96.1, 98.5]": a cell in percent."""
    return f"{100 * cell['value']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def about(found):
    data, model = found["data"], found["model"]
    lines = [f"model {model['name']}  sha256 {model.get('model_sha256', 'none: random')[:16]}",
             f"data  {data['name']}: {data['questions']} questions about {data['pictures']} pictures, "
             f"{data['captions']} captions  sha256 {data['sha256'][:16]}"]
    return "\n".join(lines + [f"note  {note}" for note in data["notes"]])


def answers(found):
    present = [name for name in COLUMNS if any(name in cells for cells in found["types"].values())]
    width = max(14, *(len(short(kind)) for kind in found["types"])) + 1
    lines = ["Answers, percent right, with 95 % intervals by picture",
             f"{'question type':{width}s}{'questions':>9s}  {present[0]:>18s}"
             + "".join(f"{name:>11s}" for name in present[1:])]
    for kind, cells in found["types"].items():
        rest = "".join(f"{100 * cells[name]['value']:11.1f}" if name in cells else " " * 11 for name in present[1:])
        lines.append(f"{short(kind):{width}s}{cells['accuracy']['count']:9d}  {percent(cells['accuracy']):>18s}{rest}")
    lines.append(f"{ORDER_SENTENCE}: {100 * found['controls']['reordered']:.2f} %")
    lines.append(confidence(found["confidence"]))
    if found["blind"]:
        lines.append(f"ALARM: {blind(found['blind'])}")
    if found["unknown"]:
        lines.append(f"{found['unknown']} questions have an answer the model was never taught, and cannot give")
    if "sort_of_clevr" in found:
        lines += ["", *sort_of_clevr(found["sort_of_clevr"])]
    return "\n".join(lines)


def confidence(found):
    """One sentence about how sure the model was."""
    auroc = "" if found["auroc"] is None else f", AUROC {found['auroc']:.3f}"
    return (f"Confidence, the largest softmax probability: {100 * found['mean']:.1f} % on average, calibration error "
            f"{found['ece']:.3f}{auroc}")


def blind(groups):
    """What is to be said of groups that are answered as well without their picture."""
    names = ", ".join(short(name.replace("_", " ")) for name in groups)
    return (f"shown another picture, the model is right as often, as far as can be told, on: {names}. Those answers "
            f"need not come from the picture")


def sort_of_clevr(found):
    lines = ["The questions of Sort-of-CLEVR, on our own scenes",
             f"{'':32s}{'accuracy':>18s}{'prior':>9s}{'shuffled':>10s}{'held-out combinations':>23s}"]
    for name, row in found.items():
        if name != "note":
            others = "".join(f"{100 * row[column]['value']:{width}.1f}" if column in row else " " * width
                             for column, width in (("prior", 9), ("shuffled", 10)))
            held = percent(row["ood"]) if "ood" in row else ""
            lines.append(f"{row['asks']:32s}{percent(row['accuracy']):>18s}{others}{held:>23s}")
    return [*lines, found["note"]]


def classes(found):
    lines = [f"Open-vocabulary classification: {len(found['names'])} classes by name, {found['questions']} questions",
             f"  top-1, {len(found['templates'])} templates   {percent(found['top1'])}",
             f"  top-1, the name alone {percent(found['plain'])}"]
    if found["top5"]:
        lines.append(f"  top-5                 {percent(found['top5'])}")
    if "unseen_top1" in found:
        lines.append(f"  names never taught    {percent(found['unseen_top1'])}  ({len(found['unseen'])} of them)")
    lines.append(f"  commonest class {100 * found['majority']:.1f}, chance {100 * found['chance']:.1f}")
    return "\n".join(lines)


def retrieval(found):
    lines = [f"Retrieval, {found['pictures']} pictures and {found['captions']} captions",
             f"  {'':20s}{'R@1':>20s}{'R@5':>20s}{'R@10':>20s}{'median':>8s}{'mean':>8s}"]
    for way, name in (("to_caption", "picture to caption"), ("to_picture", "caption to picture")):
        row = found[way]
        recalls = "".join(f"{percent(row[f'recall_at_{k}']):>20s}" for k in (1, 5, 10))
        ranks = "".join(f"{row[f'{kind}_rank']['value']:8.1f}" for kind in ("median", "mean"))
        lines.append(f"  {name:20s}{recalls}{ranks}")
        chance = "".join(f"{100 * row['chance'][str(k)]:20.1f}" for k in (1, 5, 10))
        lines.append(f"  {'by chance':20s}{chance}")
    if found["too_long"]:
        lines.append(f"  {found['too_long']} captions are longer than the Y-Encoder reads, and were left out")
    return "\n".join(lines)


def words(found):
    lines = ["What the decoder writes"]
    if "answers" in found:
        lines += [f"  a right answer        {percent(found['answers']['exact'])}",
                  f"  the nearest answer    {percent(found['answers']['nearest'])}"]
    texts = found["texts"]
    if "skipped" in texts:
        return "\n".join([*lines, f"  captions: not measured, {texts['skipped']}"])
    present = [name for name in WRITTEN if any(name in row["own"] for row in texts.values())]
    lines.append(f"  {'texts':22s}{'exact':>20s}" + "".join(f"{WRITTEN[name]:>13s}" for name in present[1:]))
    for kind, row in texts.items():
        for name, title in (("own", kind.replace("_", " ")), ("other", "  of another picture")):
            cells = row[name]
            lines.append(f"  {title:22s}{percent(cells['exact']):>20s}" + "".join(
                f"{(1 if measure == 'cider' else 100) * cells[measure]['value']:13.{2 if measure == 'cider' else 1}f}"
                for measure in present[1:] if measure in cells))
    untaught = [kind.replace("_", " ") for kind, row in texts.items() if "note" in row]
    if untaught:
        lines.append(f"  {', '.join(untaught)}: {NOT_TAUGHT}")
    return "\n".join(lines)


def health(found):
    lines = ["Health of the embeddings",
             f"  {'':22s}{'effective rank':>30s}{'mean cosine':>26s}{'uniformity':>28s}{'dead':>8s}"]
    for space, title in (("predictor", "predicted"), ("y_encoder", "answers"), ("x_encoder", "pictures")):
        row = found[space]
        rank = f"{spread(row['rank'], 1)} of {row['dimensions']}"
        lines.append(f"  {title:22s}{rank:>30s}{spread(row['cosine'], 3):>26s}{spread(row['uniformity'], 2):>28s}"
                     f"{row['dead']:8d}")
    lines.append(f"  distance to the right answer, squared: {spread(found['alignment'], 3)}")
    return "\n".join(lines + [f"  ALARM: {alarm}" for alarm in found["alarms"]])


def spread(cell, digits):
    """A cell as it is, with its interval if there is one."""
    shown = f"{cell['value']:.{digits}f}"
    return f"{shown} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]" if "low" in cell else shown


def numbers(report, indent=""):
    """Nested numbers as aligned lines."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", numbers(value, indent + "  ")]
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else value
            lines.append(f"{indent}{name:32s} {shown}")
    return "\n".join(lines)
