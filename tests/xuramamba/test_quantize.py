"""Models at fewer bits: close to float32 as their width allows, saved and loaded bit for bit."""

import json

import numpy as np
import pytest

from xuracore import no_grad
from xuracore.errors import ConfigError, FormatError, GradError
from xuramamba import LanguageModel, LanguageModelConfig, compare_widths
from xuramamba.quantize import compare, quantize, stored_bytes, width_of

IDS = np.random.default_rng(0).integers(0, 70, (2, 12))


def build(mixer="mamba1", **others):
    fields = {} if mixer == "mamba1" else {"d_state": 16, "headdim": 32}
    config = LanguageModelConfig(
        vocab_size=70, d_model=64, n_layer=2, mixer=mixer, mixer_fields=fields, **others
    )
    return LanguageModel(config, rng=np.random.default_rng(1))


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "mamba3"])
def test_fewer_bits_cost_less_memory_and_more_error(mixer):
    exact = build(mixer, d_intermediate=64)
    found, sizes = [], []
    for width in ("float32", "bfloat16", "int8", "int4"):
        other = quantize(build(mixer, d_intermediate=64), width)
        assert width_of(other) == width
        found.append(compare(exact, other, IDS)["mean"])
        sizes.append(stored_bytes(other))
    assert found[0] == 0 < found[1] < found[2] * 2 and found[2] * 4 < found[3]
    assert found[1] < 2e-3 and found[2] < 4e-3 and found[3] < 5e-2
    assert sizes == sorted(sizes, reverse=True) and sizes[3] < 0.4 * sizes[0]


@pytest.mark.parametrize("width", ["bfloat16", "int8", "int4"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, width):
    lm = quantize(build(tie_embeddings=False), width)
    lm.save_pretrained(tmp_path / "stored")
    again = LanguageModel.from_pretrained(tmp_path / "stored")
    assert width_of(again) == width
    with no_grad():
        assert np.array_equal(again(IDS)[0].data, lm(IDS)[0].data)
    with pytest.raises(ConfigError, match=width):
        LanguageModel.from_pretrained(tmp_path / "stored", dtype="float32")
    with pytest.raises(ConfigError, match=width):
        lm.save_pretrained(tmp_path / "other", format="huggingface")


def test_quantising_on_load_is_quantising_what_was_loaded(tmp_path):
    build().save_pretrained(tmp_path)
    lm = LanguageModel.from_pretrained(tmp_path, dtype="int8")
    with no_grad():
        assert np.array_equal(lm(IDS)[0].data, quantize(build(), "int8")(IDS)[0].data)
    with pytest.raises(ConfigError, match="int3"):
        LanguageModel.from_pretrained(tmp_path, dtype="int3")


def test_a_folder_that_lies_about_its_width_is_refused(tmp_path):
    quantize(build(), "int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"stored_as": "bfloat16"}))
    with pytest.raises((FormatError, KeyError)):
        LanguageModel.from_pretrained(tmp_path)


def test_inputs_that_are_no_multiple_of_32_stay_bfloat16():
    config = LanguageModelConfig(vocab_size=70, d_model=40, n_layer=1, mixer="mamba1")
    lm = quantize(LanguageModel(config), "int4")
    assert lm.backbone.layers[0].mixer.in_proj.width == "bfloat16"
    with no_grad():
        assert np.isfinite(lm(IDS)[0].data).all()


def test_stored_models_generate_and_do_not_train():
    lm = quantize(build("mamba2"), "int4")
    whole = lm.generate(IDS[:, :4], max_new_tokens=5)
    with no_grad():
        for t in range(4, 9):
            logits, _ = lm(whole[:, :t])
            assert np.array_equal(logits.data[:, -1, :70].argmax(axis=1), whole[:, t])
    assert not any(parameter.requires_grad for parameter in lm.parameters())
    lm.backbone.layers[0].norm.weight.requires_grad_()
    with pytest.raises(GradError, match="no_grad"):
        lm(IDS)
    with pytest.raises(ConfigError, match="already"):
        quantize(lm, "int8")


def test_the_command_prints_one_row_a_width(tmp_path, capsys):
    build().save_pretrained(tmp_path)
    compare_widths.main(["--model", str(tmp_path), "--tokens", "16"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["float32", "bfloat16", "int8", "int4"]
    assert "100.0%" in rows[2] and "(+0.00%)" in rows[2]
    compare_widths.main(["--model", str(tmp_path), "--width", "int8", "--output", str(tmp_path / "int8")])
    assert width_of(LanguageModel.from_pretrained(tmp_path / "int8")) == "int8"
    with pytest.raises(SystemExit):
        compare_widths.main(["--model", str(tmp_path), "--width", "int8"])
