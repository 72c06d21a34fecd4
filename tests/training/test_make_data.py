"""The command writes what the generator draws, the same bytes each time, and spares other people's files."""
import json

import numpy as np
import pytest
from PIL import Image

from training.data.dataset import Dataset
from training.data.scenes import render, scene
from training.data.tools_data import price_list
from training.scripts.make_data import contact_sheet, main


def run(out, *arguments):
    return main([*map(str, arguments), "--out", str(out)])


@pytest.mark.parametrize("kind", ["scenes", "tools", "stream"])
def test_the_same_arguments_give_the_same_bytes(tmp_path, kind, capsys):
    for name in ("a", "b"):
        assert run(tmp_path / name, "--kind", kind, "--n", 2, "--split", "test", "--length", 8,
                   "--seed", 3) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    info = json.loads((tmp_path / "a" / "data.json").read_text())
    assert (info["kind"], info["seed"], info["splits"]) == (kind, 3, ["test"])
    said = capsys.readouterr().out
    assert info["sha256"] in said and "preview.png" in said


def test_pictures_and_rows_are_the_generated_ones(tmp_path):
    run(tmp_path, "--n", 3, "--split", "val", "ood", "--no-preview")
    assert not (tmp_path / "preview.png").exists()
    for split in ("val", "ood"):
        written = [s for s in Dataset.manifest(tmp_path, split=split) if s.query]
        drawn = list(Dataset.scenes(split, 3))
        assert [(s.query, s.answer, s.type) for s in written] == [(s.query, s.answer, s.type) for s in drawn]
        for a, b in zip(written, drawn):
            assert np.array_equal(np.asarray(Image.open(a.image)), b.image)


def test_tools_come_with_the_price_list(tmp_path):
    run(tmp_path, "--kind", "tools", "--n", 4, "--split", "calib", "--seed", 9)
    assert json.loads((tmp_path / "price_list.json").read_text()) == price_list(9)
    pools = {s.meta["pool"] for s in Dataset.manifest(tmp_path).rows}
    assert pools == {"known", "calib"}


def test_streams_name_their_events(tmp_path):
    run(tmp_path, "--kind", "stream", "--n", 1, "--length", 40)
    data = Dataset.manifest(tmp_path)
    assert [row.meta["frame"] for row in data.rows] == list(range(40))
    assert any(row.meta.get("kind") in ("appears", "disappears", "moves") for row in data.rows)


def test_a_larger_size_enlarges_without_blur(tmp_path):
    run(tmp_path, "--n", 1, "--size", 128)
    large = np.asarray(Image.open(next((tmp_path / "images").glob("*.png"))))
    assert np.array_equal(large[::2, ::2], render(scene("train", 0)))


def test_a_second_run_replaces_the_first(tmp_path):
    run(tmp_path, "--n", 3)
    run(tmp_path, "--n", 1)
    assert len(list((tmp_path / "images").iterdir())) == 1


@pytest.mark.parametrize("arguments,words", [(["--n", "0"], "--n"), (["--size", "100"], "multiple of 64"),
                                             (["--kind", "stream", "--length", "0"], "length")])
def test_wrong_arguments_are_explained(tmp_path, capsys, arguments, words):
    assert run(tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert run(tmp_path, "--n", 1) == 2
    assert run(tmp_path / "thesis.txt", "--n", 1) == 2
    assert "other files" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_contact_sheet_holds_every_tile():
    tiles = [(render(scene("train", i)), f"tile {i}") for i in range(8)]
    sheet = np.asarray(contact_sheet(tiles, columns=4))
    width, height = sheet.shape[1] // 4, sheet.shape[0] // 2
    for i, (pixels, _) in enumerate(tiles):
        left, top = i % 4 * width + 10, i // 4 * height + 10
        assert np.array_equal(sheet[top:top + 192:3, left:left + 192:3], pixels)
