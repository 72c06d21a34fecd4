"""COCO captions: one document of pictures and of captions that name them by number.

    {"images": [{"id": 9, "file_name": "000000000009.jpg"}, …],
     "annotations": [{"id": 661, "image_id": 9, "caption": "a plate of food"}, …]}
"""

from training.data.bad import Refused
from training.data.json_rows import elements
from training.data.manifest import Entry
from training.data.readers.documents import element, find_documents, pictures_of, subset_of
from training.data.readers.settings import split_of

TITLE = "COCO captions"
ONE_ANSWER = False


def find(path):
    """The documents with pictures and captions."""
    return find_documents(path, "coco")


def entries(files, settings):
    """One Entry per caption, and per picture without a usable name; the pictures may stand after the captions."""
    for file in files:
        names, captions = {}, []
        subset = subset_of(file.stem)
        folder = pictures_of(file, settings, *([subset] if subset else []))
        for key, line, value in elements(file):
            if key == "images":
                refused = _keep_name(value, names)
                if refused is not None:
                    yield Entry(file, line, refused, folder)
            elif key == "annotations":
                captions.append((line, value))
        for line, value in captions:
            try:
                row = _row(value, names, split_of(file.stem))
            except Refused as error:
                row = error
            yield Entry(file, line, row, folder)


def _keep_name(value, names):
    """Note the name of a picture; the Refused where there is none."""
    if isinstance(value, Refused):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("id"), (int, str)):
        return Refused("a picture without an 'id'")
    if value["id"] in names:
        return Refused(f"the picture id {value['id']!r} is taken by an earlier one")
    names[value["id"]] = value.get("file_name")
    return None


def _row(value, names, split):
    value = element(value)
    number = value.get("image_id")
    if not isinstance(number, (int, str)) or number not in names:
        raise Refused(f"there is no picture with the id {number!r:.80}")
    if "caption" not in value:
        raise Refused("an annotation without a 'caption'")
    caption = value["caption"]
    return {"id": value.get("id"), "image": names[number], "split": split,
            "caption": caption.strip() if isinstance(caption, str) else caption}
