"""LLaVA: conversations about pictures, a list of {"id", "image", "conversations"} (Liu et al. 2023).

    [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"},
                                                     {"from": "gpt", "value": "a cat"}, …]}, …]

Each turn of a human with the answer to it is one sample; "<image>" is taken out of the text.
"""

from training.data.bad import Refused
from training.data.json_rows import elements
from training.data.manifest import Entry
from training.data.readers.documents import element, find_documents, pictures_of
from training.data.readers.settings import split_of

TITLE = "LLaVA conversations"
ONE_ANSWER = False
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant", "model")


def find(path):
    """The documents that are lists of conversations."""
    return find_documents(path, "llava")


def entries(files, settings):
    """One Entry per turn, or per conversation that cannot be used."""
    for file in files:
        folder, split = pictures_of(file, settings), split_of(file.stem)
        for number, (key, line, value) in enumerate(elements(file)):
            if key is not None:
                continue
            try:
                rows = list(_rows(element(value), number))
            except Refused as error:
                rows = [error]
            for row in rows:
                yield Entry(file, line, row if isinstance(row, Refused) else {**row, "split": split}, folder)


def _rows(value, number):
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise Refused("'conversations' must be a list of pairs of turns")
    if not isinstance(value.get("image"), (str, type(None))):
        raise Refused("'image' must be one path")
    name = value.get("id", number)
    for i in range(0, len(turns), 2):
        question, answer = _said(turns[i], _HUMAN), _said(turns[i + 1], _MODEL)
        if isinstance(question, Refused) or isinstance(answer, Refused):
            yield question if isinstance(question, Refused) else answer
        else:
            yield {"id": f"{name}/{i // 2}", "image": value.get("image"), "query": question, "answer": answer}


def _said(turn, speakers):
    """The text of a turn, or a Refused."""
    if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
        return Refused(f"expected a turn of {speakers[0]!r} with a text")
    return turn["value"].replace("<image>", "").strip()
