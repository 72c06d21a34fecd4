"""CLEVR: one document of questions that name the picture's file (Johnson et al. 2017).

    {"questions": [{"image_filename": "CLEVR_train_000000.png", "question": "…?", "answer": "yes", "split": "train",
                    "question_index": 0, "program": […]}, …]}

The type of a question is the last function of its program (count, exist, query_color, …).  Pictures lie in
images/train/ and so on.
"""

from training.data.bad import Refused
from training.data.json_rows import elements
from training.data.manifest import Entry
from training.data.readers.documents import element, find_documents, pictures_of, subset_of
from training.data.readers.settings import SPLITS

TITLE = "CLEVR questions"
ONE_ANSWER = True


def find(path):
    """The documents whose questions name the file of a picture."""
    return find_documents(path, "clevr")


def entries(files, settings):
    """One Entry per question."""
    for file in files:
        subset = subset_of(file.stem)
        folder = pictures_of(file, settings, *([subset] if subset else []))
        seen = 0
        for key, line, value in elements(file):
            if key == "questions":
                try:
                    row = _row(element(value), f"{file.stem}/{seen}", subset)
                except Refused as error:
                    row = error
                seen += 1
                yield Entry(file, line, row, folder)


def _row(value, name, subset):
    split = value.get("split", subset)
    return {"id": name, "image": value.get("image_filename"), "query": value.get("question"),
            "answer": value.get("answer"), "type": _type(value.get("program")),
            "split": SPLITS.get(split, split) if isinstance(split, str) else split}


def _type(program):
    """The function that gives the answer, or None where there is no program."""
    if not isinstance(program, list) or not program or not isinstance(program[-1], dict):
        return None
    last = program[-1].get("function", program[-1].get("type"))
    return last if isinstance(last, str) and last else None
