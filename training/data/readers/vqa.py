"""VQAv2: a document of questions, another of what ten people answered (Goyal et al. 2017).

    {"data_subtype": "train2014", "questions": [{"question_id": 4580, "image_id": 458, "question": "…?"}, …]}
    {"data_subtype": "train2014", "annotations": [{"question_id": 4580, "multiple_choice_answer": "net",
                                                   "answers": [{"answer": "net"}, …], "answer_type": "other"}, …]}

The most common answer is trained on, all are kept, and ``meta["accuracy"]`` says what each counts: min(n / 3, 1) for
an answer that n people gave (Antol et al. 2015, eq. in §3).
"""

import sys
from collections import Counter
from typing import NamedTuple

from training.data.bad import Refused
from training.data.json_rows import elements
from training.data.manifest import Entry
from training.data.readers.documents import element, find_documents, pictures_of, subset_of
from training.data.readers.settings import split_of
from xuracore.errors import FormatError

TITLE = "VQAv2"
ONE_ANSWER = False  # people disagree, and are counted


def find(path):
    """The documents of questions and of annotations; for one that is named, the others beside it."""
    if find_documents(path, "vqav2") and not path.is_dir():
        path = path.parent
    return find_documents(path, "vqav2")


class Given(NamedTuple):
    """What people answered to a question: as much of an annotation as is used."""

    number: object
    majority: str
    counts: dict
    kind: object


def entries(files, settings):
    """One Entry per question that has an answer; its line is that of the question."""
    asked, answered = {}, {}
    for file in files:
        questions, annotations = [], []
        subset = subset_of(file.stem)
        for key, line, value in elements(file):
            if key == "questions":
                questions.append((line, value))
            elif key == "annotations":
                annotations.append((line, _given(value)))
            elif key == "data_subtype" and isinstance(value, str):
                subset = value
        for found, kind in ((questions, asked), (annotations, answered)):
            if found:
                kind.setdefault(subset, []).append((file, found))
    for subset, documents in asked.items():
        if subset not in answered:
            raise FormatError(f"no document of annotations answers these questions ({subset or 'no data_subtype'})",
                              documents[0][0])
        answers = {}
        for file, found in answered[subset]:
            yield from _index(file, found, answers)
        for file, found in documents:
            folder = pictures_of(file, settings, *([subset] if subset else []))
            for line, value in found:
                try:
                    row = _row(value, answers, subset)
                except Refused as error:
                    row = error
                yield Entry(file, line, row, folder)


def _given(value):
    """The Given of an annotation, or the Refused that says why there is none."""
    try:
        number = element(value).get("question_id")
        if not isinstance(number, (int, str)):
            raise Refused("an annotation without a 'question_id'")
        counts = Counter(_texts(value.get("answers")))
        majority = value.get("multiple_choice_answer") or (counts and counts.most_common(1)[0][0])
        if not isinstance(majority, str) or not majority.strip():
            raise Refused("an annotation without an answer")
        majority = sys.intern(majority)  # few texts, many times
        return Given(number, majority, dict((counts or Counter({majority: 3})).most_common()), value.get("answer_type"))
    except Refused as error:
        return error


def _index(file, found, answers):
    """Note what was given by the number of the question; the Entries of what cannot be used."""
    for line, given in found:
        if not isinstance(given, Refused) and given.number in answers:
            given = Refused(f"the question {given.number!r} has been answered already")
        if isinstance(given, Refused):
            yield Entry(file, line, given, None)
        else:
            answers[given.number] = given


def _row(value, answers, subset):
    value = element(value)
    number, picture = value.get("question_id"), value.get("image_id")
    if not isinstance(number, (int, str)) or number not in answers:
        raise Refused(f"there is no annotation of the question {number!r:.80}")
    if not isinstance(picture, (int, str)) or isinstance(picture, bool):
        raise Refused("a question without an 'image_id'")
    given = answers[number]
    name = picture if isinstance(picture, str) else f"COCO_{subset}_{picture:012d}.jpg" if subset else f"{picture}.jpg"
    return {"id": number, "image": name, "query": value.get("question"), "answer": given.majority,
            "answers": [given.majority, *(text for text in given.counts if text != given.majority)],
            "type": given.kind, "split": split_of(subset or ""),
            "meta": {"accuracy": {text: min(count / 3, 1) for text, count in given.counts.items()}}}


def _texts(answers):
    """The texts of what people answered, the empty ones left out."""
    if answers is None:
        return []
    if not isinstance(answers, list):
        raise Refused("'answers' must be a list")
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return [sys.intern(text) for text in texts if isinstance(text, str) and text.strip()]


def soft_accuracy(sample, said):
    """What ``said`` counts as an answer to a VQAv2 Sample: min(n / 3, 1) where n people said so."""
    return sample.meta.get("accuracy", {}).get(said, 0.0)
