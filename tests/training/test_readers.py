"""Every format gives the same samples, and what is odd in one is refused at its place, never guessed at."""

import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import open_dataset
from training.data.json_rows import elements
from training.data.readers import FORMATS, detect
from training.data.readers.settings import Settings, split_of
from training.data.readers.tar import TarPicture, members
from training.data.readers.vqa import soft_accuracy
from training.data.readers.webdataset import expand
from xuracore.errors import ConfigError, FormatError, XuraError
from xuravljepa.model import CAPTION_QUERY


def png(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def put(root, files):
    """Write {name: bytes, text, or JSON data} below a folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (dict, list)):
            content = json.dumps(content)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tar(path, files, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def folder_of_classes(root):
    put(root, {"train/cat/1.png": png(), "train/cat/2.png": png(), "val/dog/1.PNG": png(), "notes.md": "not a picture"})
    return [("train/cat/1.png", CAPTION_QUERY, "cat", None, "train"),
            ("train/cat/2.png", CAPTION_QUERY, "cat", None, "train"),
            ("val/dog/1.PNG", CAPTION_QUERY, "dog", None, "val")]


def folder_of_captions(root):
    put(root, {"a.png": png(), "a.txt": " a cat\n", "deep/b.jpg": png(), "deep/b.txt": "a dog"})
    return [("a.png", None, None, "a cat", None), ("deep/b.jpg", CAPTION_QUERY, "deep", "a dog", None)]


def csv_of_questions(root):
    put(root, {"p/1.png": png(), "data.csv": 'image,question,answer,split,by\np/1.png,"what, then?",cat,val,me\n'
                                             'p/1.png,"two\nlines?",3,train,\n'})
    return [("p/1.png", "what, then?", "cat", None, "val"), ("p/1.png", "two\nlines?", "3", None, "train")]


def tsv_of_captions(root):
    put(root, {"1.png": png(), "train.tsv": "\ufefffilepath\ttitle\n1.png\ta cat, sitting\n"})
    return [("1.png", None, None, "a cat, sitting", "train")]


def coco(root):
    put(root, {"train2017/000000000009.jpg": png(), "annotations/captions_train2017.json": {
        "info": {"year": 2017}, "annotations": [{"id": 1, "image_id": 9, "caption": "a plate "},
                                                {"id": 2, "image_id": 9, "caption": "food"}],
        "images": [{"id": 9, "file_name": "000000000009.jpg"}]},
        "annotations/instances_train2017.json": {"images": [], "annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}] * 9}})
    return [("train2017/000000000009.jpg", None, None, "a plate", "train"),
            ("train2017/000000000009.jpg", None, None, "food", "train")]


def vqav2(root):
    said = [{"answer": word, "answer_id": i} for i, word in enumerate(["net"] * 8 + ["mesh"] * 2)]
    put(root, {
        "val2014/COCO_val2014_000000000458.jpg": png(),
        "v2_OpenEnded_mscoco_val2014_questions.json": {"data_subtype": "val2014", "questions": [
            {"question_id": 458000, "image_id": 458, "question": "what is behind?"}]},
        "v2_mscoco_val2014_annotations.json": {"data_subtype": "val2014", "annotations": [
            {"question_id": 458000, "image_id": 458, "multiple_choice_answer": "net", "answers": said,
             "answer_type": "other"}]}})
    return [("val2014/COCO_val2014_000000000458.jpg", "what is behind?", "net", None, "val")]


def llava(root):
    talk = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "which colour?"}, {"from": "gpt", "value": "red"}]
    put(root, {"images/a.png": png(), "chat.json": [{"id": "x", "image": "a.png", "conversations": talk},
                                                    {"id": 7, "conversations": talk[2:]}]})
    return [("images/a.png", "what is it?", "a cat", None, None), ("images/a.png", "which colour?", "red", None, None),
            (None, "which colour?", "red", None, None)]


def clevr(root):
    put(root, {"images/val/CLEVR_val_000000.png": png(), "questions/CLEVR_val_questions.json": {"questions": [
        {"image_filename": "CLEVR_val_000000.png", "question": "are there any?", "answer": "yes", "split": "val",
         "program": [{"function": "scene"}, {"function": "exist"}]}]}})
    return [("images/val/CLEVR_val_000000.png", "are there any?", "yes", None, "val")]


def webdataset(root):
    tar(root / "train-0.tar", {"a/1.jpg": png(1), "a/1.txt": b"a cat", "a/2.png": png(2),
                               "a/2.json": json.dumps({"query": "what?", "answer": "dog", "split": "val"}).encode()})
    tar(root / "train-1.tar", {"a/3.cls": b"7", "a/3.seg.png": png(3), "__index__.md": b"an index"})
    return [("train-0.tar/a/1.jpg", None, None, "a cat", "train"), ("train-0.tar/a/2.png", "what?", "dog", None, "val"),
            ("train-1.tar/a/3.seg.png", CAPTION_QUERY, "7", None, "train")]


def manifest(root):
    row = {"image": "1.png", "query": "what?", "answer": 3, "split": "test"}
    put(root, {"1.png": png(), "manifest.jsonl": json.dumps(row)})
    return [("1.png", "what?", "3", None, "test")]


KINDS = {"manifest": manifest, "folder": folder_of_classes, "folder-captions": folder_of_captions,
         "csv": csv_of_questions, "csv-tsv": tsv_of_captions, "coco": coco, "vqav2": vqav2, "llava": llava,
         "clevr": clevr, "webdataset": webdataset}


def test_every_format_is_tried():
    assert {name.partition("-")[0] for name in KINDS} | {"auto"} == set(FORMATS)


@pytest.mark.parametrize("name", KINDS)
def test_a_format_is_recognised_and_read(name, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    expected, said = KINDS[name](root), []
    for form in ("auto", name.partition("-")[0]):
        rows = open_dataset(root, form, say=said.append).rows
        found = [(None if row.image is None else os.path.relpath(str(row.image), root), row.query, row.answer,
                  row.caption, row.split) for row in rows]
        assert found == expected
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.origin[0].startswith(str(root)) for row in rows)
        for row in rows:
            if row.image is not None:
                data = row.image.read() if isinstance(row.image, TarPicture) else row.image.read_bytes()
                assert Image.open(io.BytesIO(data)).size == (4, 4)
    assert said and str(root) in said[0]


def test_what_people_answered_is_kept_and_counted(tmp_path):
    vqav2(tmp_path)
    (row,) = open_dataset(tmp_path).rows
    assert row.answers == ("net", "mesh") and row.type == "other"
    assert [soft_accuracy(row, said) for said in ("net", "mesh", "sea")] == [1, 2 / 3, 0]


def test_columns_can_be_named(tmp_path):
    put(tmp_path, {"1.png": png(), "t.csv": "bild;text;frage;antwort\n1.png;c;was?;eins\n"})
    settings = Settings(image="bild", caption="text", query="frage", answer="antwort", separator=";")
    (row,) = open_dataset(tmp_path / "t.csv", settings=settings).rows
    assert (row.query, row.answer, row.caption) == ("was?", "eins", "c")
    with pytest.raises(ConfigError, match="no column 'photo'.*bild, text"):
        open_dataset(tmp_path, settings=Settings(image="photo"))
    with pytest.raises(FormatError, match="t.csv:1: needs a column of pictures"):
        open_dataset(tmp_path)
    for first, words in (('image,"a"b', "names no columns"), ("image,text,text", "'text' is there twice"),
                         ("", "needs")):
        put(tmp_path, {"t.csv": f"{first}\n1.png,x,y\n"})
        with pytest.raises(FormatError, match=f"t.csv:1: .*{words}"):
            open_dataset(tmp_path)


def test_pictures_may_lie_elsewhere(tmp_path):
    put(tmp_path, {"a/chat.json": [{"id": 1, "image": "x/1.png", "conversations": [
        {"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}], "b/x/1.png": png()})
    put(tmp_path, {"m/manifest.jsonl": '{"image": "x/1.png", "caption": "c"}', "t/t.csv": "image,title\nx/1.png,c\n"})
    for name in ("a", "m", "t"):
        (row,) = open_dataset(tmp_path / name, settings=Settings(images=tmp_path / "b")).rows
        assert row.image == tmp_path / "b" / "x" / "1.png"


def test_what_is_not_recognised_or_not_alone_is_named(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        open_dataset(tmp_path / "none")
    with pytest.raises(FormatError, match="no data set that is recognised"):
        detect(tmp_path)
    with pytest.raises(ConfigError, match="no format 'parquet'.*webdataset"):
        detect(tmp_path, "parquet")
    with pytest.raises(FormatError, match="of the format 'coco'"):
        detect(tmp_path, "coco")
    clevr(tmp_path)
    csv_of_questions(tmp_path)
    with pytest.raises(ConfigError, match="several data sets: csv .data.csv., clevr .CLEVR_val"):
        detect(tmp_path)
    assert detect(tmp_path, "clevr")[0] == "clevr"
    manifest(tmp_path)
    assert detect(tmp_path)[0] == "manifest"


@pytest.mark.parametrize("name,split", [("captions_train2017", "train"), ("validation", "val"), ("my-test-set", "test"),
                                        ("restraint", None), ("train_val", None), ("Dev", "val")])
def test_names_tell_the_split(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("pattern,names", [
    ("a.tar", ["a.tar"]), ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
    ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"])])
def test_braces_stand_for_archives(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize("pattern", ["{a", "a}", "{x}", "{3..1}", "{0..99999999}", "{{0..1}}", "{0..999}{0..999}", "{a,b}" * 40])
def test_braces_that_make_no_sense_are_refused(pattern):
    with pytest.raises(ConfigError):
        expand(pattern)


# ---------------------------------------------------------------------- archives
LONG = "folder/" * 20 + "name" * 20 + ".png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_are_read_in_place(form, tmp_path):
    files = {"a.png": png(), "b/ü.txt": b"x" * 700, "empty": b""}
    files |= {LONG: png(9)} if form != tarfile.USTAR_FORMAT else {"d/" * 60 + "e.png": png(9)}
    path = tar(tmp_path / "a.tar", files, form)
    data = path.read_bytes()
    assert {m.name: data[m.offset : m.offset + m.size] for m in members(path)} == files
    assert not [m for m in members(path) if m.refused]


def test_nothing_leads_out_of_an_archive(tmp_path):
    path = tar(tmp_path / "a.tar", {"../../etc/passwd.txt": b"root", "/etc/x.png": png(), "ok.png": png(),
                                    "ok.txt": b"fine", "b\udcff.txt": b"?"}, tarfile.GNU_FORMAT)
    with tarfile.open(path, "a") as archive:
        for name, kind in {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "a.png": tarfile.FIFOTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    found = open_dataset(path, max_bad_fraction=0.9)
    assert [row.id for row in found.rows] == ["ok"]
    reasons = {row.line: row.reason for row in found.bad.rows}
    assert "leads out" in reasons["../../etc/passwd.txt"] and "leads out" in reasons["/etc/x.png"]
    assert "symbolic link" in reasons["link.png"] and "hard link" in reasons["hard.png"] and len(reasons) == 6
    with pytest.raises(FormatError, match=r"6 of 7 rows are bad.*\n.*a.tar:../../etc/passwd.txt: the name leads out"):
        open_dataset(path)


def test_a_sample_of_an_archive_is_whole_or_refused(tmp_path):
    path = tar(tmp_path / "a.tar", {
        "1.txt": b"no picture", "2.png": png(), "2.jpg": png(), "2.txt": b"two pictures", "3.png": png(),
        "3.json": b'{"caption": NaN}', "4.png": png(), "4.txt": b"\xff", "5.png": png(), "5.txt": b" ",
        "6.png": png(), "6.json": b'{"caption": "c", "caption": "d"}', "7.png": png(), "7.json": b"[]",
        "8.png": png(), "8.txt": b"x" * 1_000_001, "9.png": png(), "9.txt": b"good", "9b.png": png(),
        "1.png": png(), "10.png": png(), "10.txt": b"cut off"})
    with open(path, "r+b") as file:
        file.truncate(next(m.offset for m in members(path) if m.name == "10.txt") + 3)
    found = open_dataset(path, max_bad_fraction=1)
    assert [row.id for row in found.rows] == ["9"]
    words = {"1.txt": "no pictures", "2.png": "2 pictures", "3.json": "NaN", "4.txt": "UTF-8", "5.png": "empty",
             "6.json": "twice", "7.json": "object", "8.txt": "1000001 bytes", "9b.png": "needs", "1.png": "needs",
             "10.txt": "ends 4 bytes"}
    reasons = {row.line: row.reason for row in found.bad.rows}
    assert all(word in reasons[line] for line, word in words.items()), reasons


@pytest.mark.parametrize("damage,words", [
    (lambda data: b"\x1f\x8b" + data[2:], "not a tar archive"), (lambda data: data[:700], "ends"),
    (lambda data: data[:1024] + b"\x01" * 512 + data[1536:], "damaged header at byte 1024"),
    (lambda data: data[:100], "inside of the header")])
def test_damaged_archives_are_named(damage, words, tmp_path):
    path = tar(tmp_path / "a.tar", {"1.png": b"x" * 300, "1.txt": b"caption"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=words) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value)
    tar(tmp_path / "b.tar", {"2.png": png(), "2.txt": b"sound"})
    found = open_dataset(str(tmp_path / "{a,b,c}.tar"), max_bad_fraction=0.8)
    assert [row.caption for row in found.rows] == ["sound"]
    assert {str(row).partition(" ")[0] for row in found.bad.rows} >= {f"{tmp_path / 'c.tar'}:"}


def header(name, size, kind=b"0"):
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:263] = name, size, kind, b"ustar\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("block", [
    header(b"a", b"\xff" * 12), header(b"a", b"\x80" + b"\xff" * 11), header(b"a", b"99999999999\0"),
    header(b"a", b"77777777777\0", b"L"), header(b"a", b"77777777777\0", b"x"),
    header(b"a", b"00000000011\0", b"x") + b"10 path=a".ljust(512, b"\0"),
    header(b"a", b"00000000013\0", b"x") + b"11 size=-1\n".ljust(512, b"\0")])
def test_impossible_headers_are_refused(block, tmp_path):
    (tmp_path / "a.tar").write_bytes(block + bytes(1024))
    with pytest.raises(FormatError, match="byte"):
        list(members(tmp_path / "a.tar"))


def test_a_picture_larger_than_the_archive_takes_no_memory(tmp_path):
    (tmp_path / "a.tar").write_bytes(header(b"1.png", b"77777777777\0") + png())
    ((place, reason),) = [(row.line, row.reason) for row in _bad(tmp_path / "a.tar")]
    assert place == "1.png" and "bytes before its end" in reason


def _bad(path):
    with pytest.raises(FormatError):
        open_dataset(path)
    from training.data.bad import BadRows
    from training.data.manifest import samples
    from training.data.readers import READERS

    name, files = detect(path)
    bad = BadRows(path)
    list(samples(READERS[name].entries(files, Settings()), bad))
    return bad.rows


# ---------------------------------------------------------------------- documents
def test_elements_come_with_their_line_and_odd_ones_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"info": {"a": 1},\n"images": [1, {"id": 2},\n{"id": NaN}, {"a": 1, "a": 2},\n'
                    '{"b": 1e999}, {"c": ' + "9" * 5000 + '}], "x": [],\n "y": 12}\n')
    found = [(key, line, str(value)[:20] if isinstance(value, Exception) else value)
             for key, line, value in elements(path)]
    assert found == [("info", 1, {"a": 1}), ("images", 2, 1), ("images", 2, {"id": 2}),
                     ("images", 3, "NaN is not JSON"), ("images", 3, "the key 'a' appears "),
                     ("images", 4, "the number 1e999 is "), ("images", 4, "a number of 5000 dig"), ("y", 5, 12)]


@pytest.mark.parametrize("text,words", [
    ("", "expected a JSON array"), ("12", "expected"), ("[1,\n2", ":2: not JSON"), ("[1,]", "not JSON"),
    ('{"a": 1,\n\n"b" 2}', ":3: not JSON: expected :"), ("[1]\n[2]", ":2: something follows"), ('{1: 2}', "key"),
    ("[" * 100_000, "too deep"), ('["\xff"]', "UTF-8"), ('["abc', "not JSON")], ids=lambda value: str(value)[:12])
def test_documents_that_are_none_are_named_with_the_line(text, words, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=words):
        list(elements(tmp_path / "a.json"))


def test_elements_are_the_same_wherever_the_window_ends(tmp_path, monkeypatch):
    from training.data import json_rows

    rows = [{"i": i, "t": "ü\n" * (i % 7), "n": 10**i} for i in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_rows, "_CHUNK", size)
        assert [value for _, _, value in elements(tmp_path / "a.json")] == rows


@pytest.mark.parametrize("name,start", [("manifest.jsonl", b'{"query": "'), ("chat.json", b'[{"conversations": "')])
def test_a_line_without_end_takes_no_memory(name, start, tmp_path):
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(60_000_000)  # a sparse file: zeros that take no disk
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="longer than|more than 16,000,000"):
            open_dataset(path, {"manifest.jsonl": "manifest", "chat.json": "llava"}[name])
        assert tracemalloc.get_traced_memory()[1] < 55_000_000
    finally:
        tracemalloc.stop()


BROKEN = {
    "coco": (lambda root: put(root, {"c.json": {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 1, "file_name": "2.png"}, {"file_name": "x"},
                   {"id": 5, "file_name": "../x.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "good"}, {"id": 2, "image_id": 8, "caption": "c"},
                        {"id": 3, "image_id": 1}, {"id": 1, "image_id": 1, "caption": "again"},
                        {"id": 4, "image_id": 1, "caption": " "}, {"id": 6, "image_id": 5, "caption": "c"}, 7]}}),
        ["taken by an earlier", "without an 'id'", "no picture with the id 8", "without a 'caption'", "'1' is taken by",
         "empty", "leads out", "expected a JSON object"]),
    "vqav2": (lambda root: put(root, {"v.json": {
        "questions": [{"question_id": 1, "image_id": "1.png", "question": "?"}, {"question_id": 2, "image_id": "1.png"},
                      {"question_id": 3, "image_id": None, "question": "?"},
                      {"question_id": 9, "image_id": "1.png", "question": "?"},
                      {"question_id": 4, "image_id": 4, "question": "?"},
                      {"question_id": 5, "image_id": "1.png", "question": "?"}],
        "annotations": [{"question_id": n, "multiple_choice_answer": "a"} for n in (1, 2, 3, 4, 1)]
        + [{"question_id": 5, "answers": [{"answer": " "}]}, {"question_id": None}]}}),
        ["answered already", "without a 'question_id'", "a row needs", "'image_id'", "no annotation of the question 9",
         "'4.jpg' does not", "an annotation without an answer", "no annotation of the question 5"]),
    "llava": (lambda root: put(root, {"l.json": [
        {"image": "1.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
        {"conversations": []}, {"conversations": [{"from": "gpt", "value": "!"}] * 2},
        {"image": 3, "conversations": []},
        {"image": ["a", "b"], "conversations": [{}, {}]}, {"conversations": [{"from": "human", "value": "?"},
                                                                             {"from": "gpt", "value": "<image>"}]}]}),
        ["pairs", "turn of 'human'", "pairs", "one path", "empty"]),
    "clevr": (lambda root: put(root, {"q.json": {"questions": [
        {"image_filename": "1.png", "question": "?", "answer": "a"}, {"image_filename": "1.png", "question": "?"},
        {"image_filename": "1.png", "question": "? ", "answer": "b"},
        {"image_filename": "link.png", "question": "?", "answer": "a"}, []]}}),
        ["neither", "contradicts 'a', given for the same picture and question in q.json:1", "leads out",
         "JSON object"]),
    "csv": (lambda root: put(root, {"t.csv": "image,question,answer\n1.png,?,a\n1.png,?\n2.png,?,a\n1.png,?,b\n"
                                             f"1.png,{'x' * 1_000_001},a\n1.png,,\n\n,x,y\n1.png,\"a\"b,c\n"}),
            ["has 2 cells", "'2.png' does not exist", "contradicts", "longer than", "needs", "'image' is empty",
             "not a row of a table"]),
    "folder": (lambda root: put(root, {"a/empty.png": png(), "a/empty.txt": ""}),
               ["no subfolder", "leads out", "'a/empty.txt' is empty"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_odd_is_refused_at_its_place(name, tmp_path):
    build, words = BROKEN[name]
    root = put(tmp_path / "data", {"1.png": png()})
    (tmp_path / "secret.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    if name == "folder":
        put(root, {"a/1.png": png()})
        (root / "link.png").rename(root / "a" / "link.png")
    build(root)
    found = open_dataset(root, max_bad_fraction=0.99)
    assert len(found.rows) == 1 and found.bad.count == len(words)
    reasons = [row.reason for row in found.bad.rows]
    for word in words:
        assert any(word in reason for reason in reasons), (word, reasons)
    assert all(isinstance(row.line, int) or name == "folder" for row in found.bad.rows)
    with pytest.raises(FormatError, match=f"{len(words)} of {len(words) + 1} rows are bad"):
        open_dataset(root)


def test_bad_rows_are_written_down(tmp_path):
    build, words = BROKEN["csv"]
    build(put(tmp_path, {"1.png": png()}))
    bad = open_dataset(tmp_path, max_bad_fraction=1).bad
    bad.save(tmp_path / "bad_samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert len(rows) == len(words) and rows[0] == {"file": str(tmp_path / "t.csv"), "line": 3, "reason": (
        "has 2 cells; the first line names 3 columns")}
    assert bad.report(2).count("\n") == 2 and bad.report(2).endswith("… and 5 more")


WORDS = (b"null", b"NaN", b"1e999", b"[]", b'""', b'"../../x.png"', b'"\\ud800"', b"[[[[", b'"a":1,"a":2', b"\0",
         b"\xff", b'"', b"\n\n", b"\r")


def spoilt(data, rng):
    """The bytes with a few of them changed, gone, doubled, or words of mischief among them."""
    for _ in range(rng.integers(1, 5)):
        i, j, n = rng.integers(0, len(data) + 1, 3)
        data = (data[:i] + bytes(rng.integers(0, 256, 1 + n % 4, np.uint8)) + data[i + n % 5 :],
                data[:i] + data[i + n % 40 :], data[:i] + data[j : j + n % 200] + data[i:],
                data[:i] + WORDS[n % len(WORDS)] + data[i + j % 8 :], data[:i] or b"{")[rng.integers(5)]
    return data


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_spoilt_gives_rows_or_an_error_of_ours(name, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    KINDS[name](root)
    rng = np.random.default_rng(len(name))
    texts = (".json", ".jsonl", ".csv", ".tsv", ".tar", ".txt")
    for path in [path for path in sorted(root.rglob("*")) if path.suffix in texts]:
        sound = path.read_bytes()
        for _ in range(25):
            path.write_bytes(spoilt(sound, rng))
            for form in ("auto", name.partition("-")[0]):
                try:
                    rows = open_dataset(root, form, max_bad_fraction=1.0).rows
                    assert all(row.query is None or row.answer for row in rows)
                except XuraError as error:
                    assert str(root) in str(error)
        path.write_bytes(sound)
