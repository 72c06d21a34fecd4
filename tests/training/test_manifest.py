"""A manifest is data from outside: it is read exactly or refused by file and line, and never escapes."""
import json
import os

import pytest

from training.data.manifest import MAX_LINE_BYTES, Sample, read_manifest, write_manifest
from xuracore.errors import FormatError

GOOD = {"query": "what is it?", "answer": "cat"}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "cat.png").write_bytes(b"not looked into here")
    (root / "caption.txt").write_text(" a cat on a mat\n", "utf-8")
    (tmp_path / "secret.png").write_bytes(b"outside")
    return root


def write(folder, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "manifest.jsonl"


def one(folder, row):
    (sample,) = read_manifest(write(folder, row)).samples
    return sample


def reason(folder, row):
    """Why a row is refused; the error must name file and line."""
    with pytest.raises(FormatError) as caught:
        read_manifest(write(folder, GOOD, row))
    assert "manifest.jsonl:2: " in str(caught.value)
    return str(caught.value).split("manifest.jsonl:2: ")[1]


def test_a_full_row_is_read_key_by_key(folder):
    row = {"id": "a1", "image": "pictures/cat.png", "query": "what?", "answers": ["cat", "kitten"],
           "choices": ["cat", "dog", "kitten"], "caption": "a cat", "type": "animal", "split": "val",
           "tool": {"name": "lookup", "arguments": {"key": "cat"}, "result": "meows"}, "confused": 1,
           "knowledge": ["cats meow"], "meta": {"by": "me"}}
    assert one(folder, row) == Sample(
        "a1", (folder / "pictures" / "cat.png").resolve(), "what?", "cat", ("cat", "kitten"),
        ("cat", "dog", "kitten"), "a cat", "animal", "val", row["tool"], 1, ("cats meow",), {"by": "me"})


def test_aliases_numbers_and_unknown_keys(folder):
    sample = one(folder, {"question": "how many?", "answer": 3, "id": 7, "tool_used": "count",
                          "confused": False, "source": "web", "meta": {"k": 1}})
    assert (sample.query, sample.answer, sample.answers, sample.id) == ("how many?", "3", ("3",), "7")
    assert sample.tool == {"name": "count"} and sample.confused == 0
    assert sample.meta == {"source": "web", "k": 1}
    assert one(folder, {"text": "a cat"}).caption == "a cat"
    assert one(folder, {"text": "caption.txt"}).caption == "a cat on a mat"


def test_blank_lines_a_byte_order_mark_and_null_are_fine(folder):
    path = write(folder, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  ", {**GOOD, "image": None})
    manifest = read_manifest(path)
    assert [s.id for s in manifest.samples] == ["line-1", "line-4"] and manifest.report() == ""


def test_what_is_written_is_read_back(folder):
    samples = [Sample("1", "pictures/cat.png", "what?", "katze", ("katze", "chat"), type="t", split="train",
                      meta={"x": [1, "ü"]}), Sample("2", caption="a line\nbreak")]
    write_manifest(folder / "m.jsonl", samples)
    first, second = read_manifest(folder / "m.jsonl").samples
    assert first.image == (folder / "pictures" / "cat.png").resolve()
    assert (first.answers, first.meta) == (("katze", "chat"), {"x": [1, "ü"]})
    assert second.caption == "a line\nbreak"
    write_manifest(folder / "m.jsonl", [first, second])
    assert read_manifest(folder / "m.jsonl").samples == (first, second)


def test_relative_manifest_paths_work_from_any_folder(folder, monkeypatch):
    write(folder, {**GOOD, "image": "pictures/cat.png"})
    monkeypatch.chdir(folder.parent)
    (sample,) = read_manifest("data/manifest.jsonl").samples
    monkeypatch.chdir("/")
    assert sample.image.is_file()


@pytest.mark.parametrize("image", ["../secret.png", "pictures/../../secret.png", "/etc/passwd", "link.png",
                                   "folder-link/secret.png", "https://example.org/a.png", "C:\\a.png",
                                   "a\0b.png", "x" * 5000, "loop.png"])
def test_no_path_leaves_the_folder(folder, image):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "folder-link").symlink_to(folder.parent)
    os.symlink("loop.png", folder / "loop.png")
    text = reason(folder, {**GOOD, "image": image})
    assert any(words in text for words in ("leads out", "absolute", "plain relative", "cannot be followed",
                                           "does not exist")), text
    if "secret" in image or image == "link.png":
        assert "leads out" in text


def test_a_caption_file_may_not_leave_the_folder_either(folder):
    (folder.parent / "secret.txt").write_text("secret")
    assert "leads out" in reason(folder, {"text": "../secret.txt"})


def test_a_link_inside_the_folder_is_fine(folder):
    (folder / "alias.png").symlink_to(folder / "pictures" / "cat.png")
    assert one(folder, {**GOOD, "image": "alias.png"}).image.name == "alias.png"


def test_missing_pictures_are_reported_unless_asked_not_to(folder):
    row = {**GOOD, "image": "pictures/dog.png"}
    assert "'pictures/dog.png' does not exist" in reason(folder, row)
    assert read_manifest(write(folder, row), check_files=False).samples[0].image.name == "dog.png"


@pytest.mark.parametrize("row,words", [
    (b"{", "not JSON"), (b"[1]", "JSON object"), (b'{"query": "\xff"}', "UTF-8"),
    (b'{"query": "q", "answer": NaN}', "NaN"), (b"[" * 100_000, "JSON"),
    (b'{"id": ' + b"9" * 5000 + b"}", "JSON"), (b'{"id": 1e999, "caption": "c"}', "finite"),
    ({"query": "what?"}, "neither"), ({"id": "x"}, "needs"),
    ({"query": "", "answer": "a"}, "empty"), ({"query": ["q"], "answer": "a"}, "string"),
    ({**GOOD, "answers": []}, "empty list"), ({**GOOD, "answers": [None]}, "null"),
    ({**GOOD, "answers": ["dog"]}, "among"), ({**GOOD, "choices": ["dog"]}, "choices"),
    ({**GOOD, "answer": True}, "string"), ({**GOOD, "confused": 2}, "0 or 1"),
    ({**GOOD, "tool": "lookup"}, "object"), ({**GOOD, "tool": {"arguments": {}}}, "name"),
    ({**GOOD, "tool": {"name": "a", "args": {}}}, "'args'"), ({**GOOD, "meta": 3}, "object"),
    ({**GOOD, "question": "again?"}, "another name"), ({**GOOD, "id": "line-1"}, "taken"),
    ({**GOOD, "query": "\ud800"}, "surrogate"), (b'{"caption": "c", "caption": "d"}', "appears twice"),
    ({**GOOD, "answer": "dog"}, "contradicts 'cat', given for the same picture and question in manifest.jsonl:1"),
    ({"query": "What  is it?", "answer": "dog"}, "contradicts"),
    (b'{"caption": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than")], ids=lambda value: str(value)[:30])
def test_a_bad_row_is_reported_with_its_reason(folder, row, words):
    assert words in reason(folder, row)


@pytest.mark.parametrize("row", [
    {**GOOD}, {**GOOD, "answers": ["cat", "kitten"]}, {**GOOD, "answer": "kitten", "answers": ["kitten", "cat"]},
    {**GOOD, "answer": "dog", "split": "val"}, {**GOOD, "answer": "dog", "image": "pictures/cat.png"},
    {**GOOD, "answer": "dog", "tool": {"name": "lookup"}}])
def test_other_answers_that_are_no_contradiction(folder, row):
    assert len(read_manifest(write(folder, GOOD, row)).samples) == 2


def test_after_an_overlong_line_the_numbers_still_hold(folder):
    path = write(folder, b"x" * (2 * MAX_LINE_BYTES + 5), GOOD, b"{")
    manifest = read_manifest(path, max_bad_fraction=1)
    assert [row.line for row in manifest.bad] == [1, 3] and [s.id for s in manifest.samples] == ["line-2"]


def test_bad_rows_are_dropped_up_to_the_allowed_fraction(folder):
    path = write(folder, GOOD, b"{", GOOD, b"nonsense")
    manifest = read_manifest(path, max_bad_fraction=0.5)
    assert len(manifest.samples) == 2 and [row.line for row in manifest.bad] == [2, 4]
    assert f"{path}:4: not JSON" in manifest.report()
    with pytest.raises(FormatError, match="2 of 4 rows are bad"):
        read_manifest(path, max_bad_fraction=0.4)


def test_many_bad_rows_do_not_flood_the_message(folder):
    with pytest.raises(FormatError, match="… and 95 more"):
        read_manifest(write(folder, *[b"{"] * 100))


def test_missing_empty_and_unreadable_manifests_are_named(folder):
    with pytest.raises(FormatError, match="none.jsonl.*no such file"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(FormatError, match="manifest.jsonl.*no rows"):
        read_manifest(write(folder))
    with pytest.raises(FormatError, match="pictures"):
        read_manifest(folder / "pictures")


def test_a_failed_write_leaves_the_old_manifest_whole(folder):
    path = write(folder, GOOD)
    before = path.read_bytes()
    for wrong in (Sample("1", "../secret.png", caption="c"), Sample("1", object(), caption="c")):
        with pytest.raises(FormatError):
            write_manifest(path, [Sample("0", caption="fine"), wrong])
    with pytest.raises(ValueError):
        write_manifest(path, [Sample("0", caption="c", meta={"x": float("nan")})])
    assert path.read_bytes() == before and not list(folder.glob("*.part"))
