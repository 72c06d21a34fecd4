"""xura generate and xura inspect: text on the terminal, clear errors, nothing loaded that is only looked at."""

import contextlib
import io as streams
import json
import struct
import zipfile

import numpy as np
import pytest

from xuracore import io
from xuramamba import LanguageModel, LanguageModelConfig
from xuramamba.bpe import ALPHABET
from xuravljepa import cli

BYTES = LanguageModelConfig(264, 16, 2, "mamba1", {"d_state": 4}, eos_token_ids=(258,))


@pytest.fixture(autouse=True)
def _no_notice(monkeypatch):
    monkeypatch.setattr(cli, "compiling_notice", contextlib.nullcontext)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that writes printable bytes only."""
    path = tmp_path_factory.mktemp("model")
    model = LanguageModel(BYTES, rng=np.random.default_rng(0))
    table = np.random.default_rng(1).standard_normal((264, 16)).astype(np.float32)
    table[np.r_[0:32, 127:264]] *= 0.01
    model.backbone.embedding.weight.data[:] = table
    model.save_pretrained(path)
    return path


def run(capsys, *arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def made(capsys, folder, *options):
    code, out, err = run(capsys, "generate", "--model", folder, "--prompt", "red ", "--max-new-tokens", 12, *options)
    assert code == 0, err
    assert out.startswith("red ") and out.endswith("\n")
    return out[4:-1], err


def tokenizer_json(path, extra=()):
    vocabulary = {character: i for i, character in enumerate(ALPHABET.values())}
    vocabulary |= {word: 256 + i for i, word in enumerate(extra)}
    level = {"type": "ByteLevel", "add_prefix_space": False}
    io.save_json(path, {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "pre_tokenizer": level})


def test_text_and_a_report_of_speed(capsys, folder):
    text, err = made(capsys, folder)
    assert len(text) == 12 and "prompt 4 tokens" in err and "tokens/s" in err and "ended by length" in err
    assert made(capsys, folder, "--quiet") == (text, "")


def test_the_same_seed_draws_the_same_text(capsys, folder):
    options = ("--temperature", 2, "--top-k", 90, "--top-p", 0.99, "--repetition-penalty", 1.1, "--quiet")
    texts = [made(capsys, folder, *options, "--seed", seed)[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_before_a_stop_string(capsys, folder):
    text, _ = made(capsys, folder)
    stopped, err = made(capsys, folder, "--stop", text[3:5], "--stop", "never there")
    assert stopped == text[: text.index(text[3:5])] and "stop string" in err


@pytest.mark.parametrize("width", ["bfloat16", "int8", "int4"])
def test_weights_of_fewer_bits(capsys, folder, width):
    assert made(capsys, folder, "--dtype", width, "--quiet")[0]


def test_a_prompt_from_standard_input_is_read_in_pieces(capsys, folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", streams.StringIO("abc " * 1500))
    code, out, err = run(capsys, "generate", "--model", folder, "--prompt", "-", "--max-new-tokens", 3)
    assert code == 0 and len(out) == 4 and "6,000 of 6,000 tokens" in err and "prompt 6,000 tokens" in err


def test_ctrl_c_ends_the_text_with_what_there_is(capsys, folder, monkeypatch):
    from xuravljepa import cli_generate

    text, _ = made(capsys, folder)
    show, seen = cli_generate._Screen.show, []

    def interrupted(self, ids):
        show(self, ids)
        seen.append(ids)
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate._Screen, "show", interrupted)
    code, out, err = run(capsys, "generate", folder, "red ", "--max-new-tokens", 12)
    assert code == 130 and out == f"red {text[:5]}\n" and "interrupted" in err


def test_a_terminal_is_not_moved_about(capsys, folder, monkeypatch):
    from xuravljepa import cli_generate

    screen = cli_generate._Screen(cli_generate._tokenizer(folder, None), ())
    screen._bare = False
    screen.write("a\x1b[2J\tb\nc")
    assert capsys.readouterr().out == "a·[2J    b\nc"


def test_the_tokenizer_of_the_folder_or_the_one_named(capsys, folder, tmp_path):
    LanguageModel(BYTES.replace(vocab_size=300)).save_pretrained(tmp_path)
    arguments = ("generate", "--model", tmp_path, "--prompt", "red", "--max-new-tokens", 2)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "not that of bytes" in err and "--tokenizer" in err
    tokenizer_json(tmp_path / "other.json")
    assert run(capsys, *arguments, "--tokenizer", tmp_path / "other.json")[0] == 0
    tokenizer_json(tmp_path / "tokenizer.json", extra=[f"word{i}" for i in range(44)])
    assert run(capsys, *arguments)[0] == 0
    tokenizer_json(tmp_path / "tokenizer.json", extra=[f"word{i}" for i in range(45)])
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "ids up to 300" in err and "not the model's tokenizer" in err


def test_ids_that_the_tokenizer_lacks_are_never_chosen(capsys, folder, tmp_path):
    """A vocabulary is often rounded up: what no token has cannot be shown."""
    model = LanguageModel(BYTES.replace(vocab_size=300), rng=np.random.default_rng(0))
    hidden = model.backbone(np.array([[1, 2]]))[0].numpy()[0, -1]
    model.backbone.embedding.weight.data[256:] = hidden * 100
    model.save_pretrained(tmp_path)
    tokenizer_json(tmp_path / "tokenizer.json")
    code, out, err = run(capsys, "generate", tmp_path, "red", "--max-new-tokens", 4, "--quiet")
    assert code == 0, err


BAD = {
    "give one folder": ([], {}),
    "no such folder": (["--model", "{here}/missing", "--prompt", "x"], {}),
    "no config.json": (["--model", "{here}/empty", "--prompt", "x"], {}),
    "the prompt is empty": (["--model", "{folder}", "--prompt", ""], {}),
    "top_k": (["--model", "{folder}", "--prompt", "x", "--top-k", "0"], {}),
    "truncated": (["--model", "{here}/cut", "--prompt", "x"], {}),
    "stop strings": (["--model", "{folder}", "--prompt", "x", "--stop", ""], {}),
}


@pytest.mark.parametrize("says", BAD)
def test_mistakes_are_one_line_and_2(capsys, folder, tmp_path, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "cut" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    arguments = [word.format(here=tmp_path, folder=folder) for word in BAD[says][0]]
    code, _, err = run(capsys, "generate", *arguments)
    assert code == 2 and err.count("\n") == 1
    assert says in err or says == "truncated" and "the file at byte" in err


# ------------------------------------------------------------------ inspect
def test_inspect_draws_the_tree(capsys, folder):
    code, out, _ = run(capsys, "inspect", folder, "--summary")
    assert code == 0
    total = LanguageModel(BYTES).parameter_count()
    assert f"  backbone: {total:,}\n    embedding: 4,224\n    layers × 2: " in out and "      mixer: " in out


def test_inspect_lists_a_torch_file_and_limits_without_end(capsys, tmp_path):
    raw = np.arange(4, dtype=np.float32)
    pickle = (b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
              b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x02K\x02\x86K\x02K\x01\x86"
              b"\x89}tRs.")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickle)
        archive.writestr("m/data/0", raw.tobytes())
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    code, out, err = run(capsys, "inspect", tmp_path)
    assert code == 0 and err == "" and "a  F32   2 × 2" in out and "Infinity" in out
    (file,) = json.loads(run(capsys, "inspect", tmp_path / "pytorch_model.bin", "--json")[1])["files"].values()
    assert file["tensors"] == {"a": {"dtype": "F32", "shape": [2, 2]}}
    (tmp_path / "pytorch_model.bin").write_bytes(struct.pack("<Q", 7))
    assert run(capsys, "inspect", tmp_path)[0] == 2
