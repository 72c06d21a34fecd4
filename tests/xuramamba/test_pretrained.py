"""Model folders of others and our own: the same logits, every difference reported, nothing half done."""

import json
import math
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import io
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuracore.nn.module import StateDictError
from xuramamba import LanguageModel, LanguageModelConfig, pretrained, published
from xuramamba.quantize import quantize

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("hf_mamba", "hf_mamba2", "hf_falcon")
SMALL = {
    "mamba1": LanguageModelConfig(13, 8, 2, "mamba1", {"d_state": 3}, pad_vocab_size_multiple=8),
    "mamba2": LanguageModelConfig(
        13, 8, 2, "mamba2", {"d_state": 4, "headdim": 4, "ngroups": 2, "dt_limit": (0.001, math.inf)},
        tie_embeddings=False,
    ),
    "mamba3": LanguageModelConfig(13, 8, 2, "mamba3", {"d_state": 4, "headdim": 4}, d_intermediate=5),
    "mixed": LanguageModelConfig(
        13, 8, 3, layer_types=("mamba1", "mamba2", "mamba1"), rms_norm=False, eos_token_ids=(2, 3),
        mixer_fields={"mamba2": {"d_state": 4, "headdim": 8}, "mamba1": {"mixer_rms_eps": 1e-6}},
    ),
}  # fmt: skip


def build(name):
    return LanguageModel(SMALL[name], rng=np.random.default_rng(0))


def logits(model, ids=((1, 2, 3, 4),)):
    with xc.no_grad():
        return model(np.array(ids))[0].numpy()


def copied(folder, path):
    shutil.copytree(GOLDEN / "upstream" / folder, path, dirs_exist_ok=True)
    return path


def edit(path, **changes):
    """Change keys of config.json; None removes one."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(path, change):
    tensors = dict(io.load_safetensors(path))
    change(tensors)
    io.save_safetensors(path / "model.safetensors", tensors)


# ------------------------------------------------------------------ golden folders
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_hugging_face_folder_gives_its_logits_loss_and_gradients(folder):
    model = LanguageModel.from_pretrained(GOLDEN / "upstream" / folder)
    golden = np.load(GOLDEN / "upstream" / folder / "golden.npz")
    ids = golden["ids"]
    scores, _ = model(ids)
    np.testing.assert_allclose(scores.numpy(), golden["logits"], atol=1e-5)
    loss = xc.ops.cross_entropy(scores[:, :-1].reshape(-1, scores.shape[-1]), ids[:, 1:].reshape(-1))
    loss.backward()
    np.testing.assert_allclose(loss.item(), golden["loss"], rtol=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key in (key for key in golden.files if key.startswith("grad.")):
        expected, own = golden[key], gradients.pop(pretrained.own_name(key.removeprefix("grad.")))
        np.testing.assert_allclose(own, expected, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=key)
    assert not gradients
    with xc.no_grad():
        state, pieces = None, []
        for t in range(ids.shape[1]):
            piece, state = model(ids[:, t : t + 1], state)
            pieces.append(piece.numpy())
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), golden["logits"], atol=1e-5)


def weights_of(golden, prefix=""):
    return {prefix + key.removeprefix("w."): golden[key] for key in golden.files if key.startswith("w.")}


def test_a_falcon_backbone_saved_without_its_head(tmp_path):
    golden = np.load(GOLDEN / "falcon_mamba.npz")
    config = json.loads(str(golden["meta"]))["config"] | {"model_type": "falcon_mamba"}
    io.save_safetensors(tmp_path / "model.safetensors", weights_of(golden))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LanguageModel.from_pretrained(tmp_path)
    hidden, _ = model.backbone(golden["in.input_ids"])
    np.testing.assert_allclose(hidden.numpy(), golden["out.last_hidden_state"], atol=1e-5)
    hidden.backward(golden["cot.last_hidden_state"])
    for name, parameter in model.named_parameters():
        key = f"gw.{name.removeprefix('backbone.').replace('embedding.', 'embeddings.')}"
        np.testing.assert_allclose(parameter.grad, golden[key], atol=4e-5, rtol=1e-4, err_msg=name)


def test_the_loss_of_padded_rows(tmp_path):
    golden = np.load(GOLDEN / "mamba1_lm_loss.npz")
    config = json.loads(str(golden["meta"]))["config"] | {"model_type": "mamba"}
    io.save_safetensors(tmp_path / "model.safetensors", weights_of(golden))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LanguageModel.from_pretrained(tmp_path)
    mask, labels = golden["in.attention_mask"].astype(bool), golden["in.labels"][:, 1:].reshape(-1)
    scores, _ = model(golden["in.input_ids"], mask=mask)
    np.testing.assert_allclose(scores.numpy()[mask], golden["out.logits"][mask], atol=2e-5)
    counted = np.flatnonzero(labels >= 0)
    loss = xc.ops.cross_entropy(scores[:, :-1].reshape(-1, scores.shape[-1])[counted], labels[counted])
    np.testing.assert_allclose(loss.item(), golden["out.loss"], rtol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        key = f"gw.{name.replace('embedding.', 'embeddings.')}"
        np.testing.assert_allclose(parameter.grad, golden[key], atol=1e-4, rtol=1e-4, err_msg=name)


# ------------------------------------------------------------------ saving
@pytest.mark.parametrize("name", SMALL)
def test_a_saved_model_is_the_same_model(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "a" / "b")
    again = LanguageModel.from_pretrained(tmp_path / "a" / "b")
    assert again.config == model.config
    np.testing.assert_array_equal(logits(again), logits(model))
    exact = LanguageModel.from_pretrained(tmp_path / "a" / "b", dtype="float64")
    assert logits(exact).dtype == np.float64
    np.testing.assert_allclose(logits(exact), logits(model), atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_hugging_face_format_goes_there_and_back(folder, tmp_path):
    model = LanguageModel.from_pretrained(GOLDEN / "upstream" / folder)
    model.save_pretrained(tmp_path, format="huggingface")
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config == model.config
    np.testing.assert_array_equal(logits(again), logits(model))
    theirs = json.loads((GOLDEN / "upstream" / folder / "config.json").read_text())
    ours = json.loads((tmp_path / "config.json").read_text())
    for key in ("model_type", "architectures", "hidden_size", "state_size", "num_hidden_layers", "vocab_size"):
        assert ours[key] == theirs[key]
    names = io.read_header(tmp_path).tensors.keys()
    assert names == io.read_header(GOLDEN / "upstream" / folder).tensors.keys()
    assert io.read_metadata(tmp_path) == {"format": "pt"}


def test_what_transformers_has_no_class_for_is_not_saved_for_it(tmp_path):
    changed = SMALL["mamba2"].replace(mixer_fields={"headdim": 4, "norm_before_gate": True})
    models = {
        "no class for mamba3": build("mamba3"), "mixed layers": build("mixed"),
        "norm_before_gate": LanguageModel(changed),
        "no MLP": LanguageModel(SMALL["mamba1"].replace(d_intermediate=8)),
        "RMSNorm": LanguageModel(SMALL["mamba1"].replace(rms_norm=False)),
    }  # fmt: skip
    for says, model in models.items():
        with pytest.raises(ConfigError, match=says):
            model.save_pretrained(tmp_path, format="huggingface")
    with pytest.raises(ConfigError, match="expected one of xura, huggingface"):
        build("mamba1").save_pretrained(tmp_path, format="onnx")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ layouts of others
def test_sharded_weights_are_the_same_weights(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")
    expected = logits(LanguageModel.from_pretrained(folder))
    tensors = dict(io.load_safetensors(folder))
    (folder / "model.safetensors").unlink()
    where = {}
    for i, name in enumerate(tensors):
        where[name] = f"model-{i % 2}.safetensors"
    for shard in sorted(set(where.values())):
        io.save_safetensors(folder / shard, {name: tensors[name] for name in tensors if where[name] == shard})
    io.save_json(folder / "model.safetensors.index.json", {"weight_map": where})
    np.testing.assert_array_equal(logits(LanguageModel.from_pretrained(folder)), expected)


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_half_precision_is_widened(tmp_path, stored):
    folder = copied("hf_mamba2", tmp_path / "m")
    tensors = dict(io.load_safetensors(folder))
    expected = {}
    for name, array in tensors.items():
        half = array.astype(np.float16) if stored == "F16" else io.to_bfloat16(array)
        tensors[name] = half
        expected[name] = half.astype(np.float32) if stored == "F16" else io.from_bfloat16(half)
    io.save_safetensors(folder / "model.safetensors", tensors, bfloat16=tensors if stored == "BF16" else ())
    model = LanguageModel.from_pretrained(folder)
    for name, array in model.state_dict().items():
        assert array.dtype == np.float32
        theirs = name.replace("embedding.", "embeddings.")
        np.testing.assert_array_equal(array, expected[theirs])


def torch_file(path, state):
    """A pytorch_model.bin, its pickle written byte by byte."""

    def text(value):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    ordered, body = b"ccollections\nOrderedDict\n)R", b""
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, array) in enumerate(state.items()):
            kind = {"uint16": "BFloat16", "float16": "Half"}.get(str(array.dtype), "Float")
            storage = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(str(key)) + text("cpu")
            strides = [stride // array.itemsize for stride in array.strides]
            body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage
            body += b"J" + struct.pack("<i", array.size) + b"tQK\x00" + numbers(array.shape) + numbers(strides)
            body += b"\x89" + ordered + b"tR"
            archive.writestr(f"m/data/{key}", array.tobytes())
        archive.writestr("m/data.pkl", b"\x80\x02" + ordered + b"(" + body + b"u.")


STATE_SPACES = {
    "mamba1": {"ssm_cfg": {"d_state": 3, "use_fast_path": True}},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "chunk_size": 256}},
    "siso": {"ssm_cfg": {"layer": "Mamba3", "d_state": 4, "headdim": 8, "rope_fraction": 0.5, "A_floor": 1e-3},
             "d_intermediate": 10, "pad_vocab_size_multiple": 16},
    "mimo": {"ssm_cfg": {"layer": "Mamba3", "d_state": 4, "headdim": 8, "is_mimo": True, "mimo_rank": 2}},
}  # fmt: skip


@pytest.mark.parametrize("kind", STATE_SPACES)
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_state_spaces_folder(tmp_path, kind, weights):
    config = {"d_model": 8, "n_layer": 2, "vocab_size": 21, "rms_norm": True, "residual_in_fp32": True,
              "fused_add_norm": True, **STATE_SPACES[kind]}  # fmt: skip
    io.save_json(tmp_path / "config.json", config)
    fields = published.language_model_fields(config, {})
    expected = LanguageModel(LanguageModelConfig.from_dict(fields), rng=np.random.default_rng(0))
    assert expected.config.padded_vocab_size == (32 if kind == "siso" else 24)
    assert expected.config.mixer_fields.get("rotary") == {"siso": "pair", "mimo": "half"}.get(kind)
    state = expected.state_dict()
    if weights.endswith("bin"):
        bits = {name: io.to_bfloat16(array) for name, array in state.items()}
        torch_file(tmp_path / weights, bits | {"lm_head.weight": bits["backbone.embedding.weight"]})
        expected.load_state_dict({name: io.from_bfloat16(array) for name, array in bits.items()})
    else:
        io.save_safetensors(tmp_path / weights, state)
    model = LanguageModel.from_pretrained(tmp_path)
    assert model.config == expected.config
    np.testing.assert_array_equal(logits(model), logits(expected))


def test_the_activation_of_older_mamba3_models_is_an_option(tmp_path):
    build("mamba3").save_pretrained(tmp_path)
    old = LanguageModel.from_pretrained(tmp_path, mixer_fields={"a_activation": "softplus"})
    assert old.config.mixer_fields["a_activation"] == "softplus"
    assert np.abs(logits(old) - logits(build("mamba3"))).max() > 1e-6
    with pytest.raises(ConfigError, match="a_activatoin"):
        LanguageModel.from_pretrained(tmp_path, mixer_fields={"a_activatoin": "softplus"})


def test_codestral_as_mistral_publishes_it(tmp_path):
    params = {"dim": 64, "n_layers": 1, "vocab_size": 16, "n_groups": 2, "rms_norm": True,
              "pad_vocab_size_multiple": 1, "model_type": "mamba", "tie_embeddings": False}  # fmt: skip
    io.save_json(tmp_path / "params.json", params)
    fields = {"ngroups": 2}
    model = LanguageModel(LanguageModelConfig(16, 64, 1, "mamba2", fields, tie_embeddings=False))
    io.save_safetensors(tmp_path / "consolidated.safetensors",
                        {f"model.{name}": array for name, array in model.state_dict().items()})  # fmt: skip
    np.testing.assert_array_equal(logits(LanguageModel.from_pretrained(tmp_path)), logits(model))


# ------------------------------------------------------------------ traps of configurations
def test_infinity_in_both_spellings_and_finite_limits(tmp_path):
    folder = copied("hf_mamba2", tmp_path / "m")
    expected = logits(LanguageModel.from_pretrained(folder))
    raw = (folder / "config.json").read_text()
    edit(folder, time_step_limit="LIMIT")
    text = (folder / "config.json").read_text()
    for written in ("[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]'):
        (folder / "config.json").write_text(text.replace('"LIMIT"', written))
        np.testing.assert_array_equal(logits(LanguageModel.from_pretrained(folder)), expected)
    (folder / "config.json").write_text(text.replace('"LIMIT"', "[0.0, 0.01]"))
    assert np.abs(logits(LanguageModel.from_pretrained(folder)) - expected).max() > 1e-4
    (folder / "config.json").write_text(raw.replace("Infinity", "Nothing"))
    with pytest.raises(ConfigError):
        LanguageModel.from_pretrained(folder)


def test_a_head_that_is_missing_is_the_embedding_and_one_that_differs_is_used(tmp_path):
    folder = copied("hf_mamba2", tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert LanguageModel.from_pretrained(folder).config.tie_embeddings
    folder = copied("hf_mamba", tmp_path / "n")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"]}))
    assert LanguageModel.from_pretrained(folder).config.tie_embeddings
    rewrite(folder, lambda t: t.update({"lm_head.weight": 2 * t["backbone.embeddings.weight"]}))
    before = logits(LanguageModel.from_pretrained(copied("hf_mamba", tmp_path / "o")))
    with pytest.warns(UserWarning, match="ties lm_head"):
        model = LanguageModel.from_pretrained(folder)
    np.testing.assert_allclose(logits(model), 2 * before, atol=1e-5)


def test_an_expand_that_the_weights_contradict_is_theirs(tmp_path):
    folder = copied("hf_falcon", tmp_path / "m")
    expected = logits(LanguageModel.from_pretrained(folder))
    edit(folder, expand=16)
    np.testing.assert_array_equal(logits(LanguageModel.from_pretrained(folder)), expected)


BAD_CONFIGS = {
    "'gelu'": {"hidden_act": "gelu"},
    "hidden_size is '32'": {"hidden_size": "32"},
    "num_hidden_layers is 0": {"num_hidden_layers": 0},
    "model_type is 'llama'": {"model_type": "llama"},
    "model_type is None": {"model_type": None},
    "expand is 'x'": {"expand": "x"},
    "wrong type": {"layer_norm_epsilon": "small", "eos_token_id": "x"},
}


@pytest.mark.parametrize("says", BAD_CONFIGS)
def test_configurations_that_mean_nothing_are_refused(tmp_path, says):
    folder = copied("hf_mamba", tmp_path / "m")
    edit(folder, **BAD_CONFIGS[says])
    with pytest.raises(ConfigError, match=says):
        LanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("changes, says", [
    ({"num_hidden_layers": 10**9}, "says 1000000000 layers, the weights have 2"),
    ({"vocab_size": 10**12}, "says 1000000000000 tokens .* embedding is 64 × 32"),
    ({"hidden_size": 10**9}, "of width 1000000000"), ({"state_size": 10**10}, "d_state is 10000000000"),
    ({"conv_kernel": 10**10}, "d_conv is"), ({"time_step_rank": 10**10}, "dt_rank is")])  # fmt: skip
def test_a_configuration_cannot_claim_more_memory_than_the_weights_have(tmp_path, changes, says):
    folder = copied("hf_mamba", tmp_path / "m")
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=says):
        LanguageModel.from_pretrained(folder)


def test_layers_that_are_not_here_are_refused():
    base = {"d_model": 8, "n_layer": 2, "vocab_size": 21}
    for change in ({"attn_layer_idx": [1]}, {"ssm_cfg": {"layer": "Mamba9"}}, {"ssm_cfg": 3}):
        with pytest.raises(ConfigError, match="attn_layer_idx|ssm_cfg"):
            published.language_model_fields(base | change, {})
    config = published.language_model_fields(base | {"ssm_cfg": {"d_stat": 3}}, {})
    with pytest.raises(ConfigError, match="did you mean 'd_state'"):
        LanguageModelConfig.from_dict(config)


@pytest.mark.parametrize("fields", [
    {"layer_types": ("mamba1",)}, {"layer_types": ("mamba1", "mamba9")}, {"eos_token_ids": (13,)},
    {"layer_types": ("mamba1", "mamba2"), "mixer_fields": {"mamba3": {}}},
    {"layer_types": ("mamba1", "mamba2"), "mixer_fields": {"mamba1": {"d_stat": 2}}},
    {"pad_vocab_size_multiple": 0}, {"mixer_fields": {"d_stat": 2}}])  # fmt: skip
def test_impossible_models_are_refused(fields):
    with pytest.raises(ConfigError):
        LanguageModelConfig(**{"vocab_size": 13, "d_model": 8, "n_layer": 2, **fields})


def test_residual_branches_start_small():
    model = LanguageModel(LanguageModelConfig(8, 64, 16, "mamba1", d_intermediate=128))
    for layer in model.backbone.layers:
        for linear in (layer.mixer.out_proj, layer.mlp.fc2):
            bound = 1 / math.sqrt(linear.weight.shape[1] * 16)
            assert 0.98 * bound < np.abs(linear.weight.data).max() <= bound * 1.0001


# ------------------------------------------------------------------ damage
def test_every_difference_is_told_at_once(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")

    def change(tensors):
        tensors["backbone.layers.0.mixer.in_proj.wieght"] = tensors.pop("backbone.layers.0.mixer.in_proj.weight")
        tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"][:-1]
        del tensors["backbone.layers.1.mixer.D"]

    rewrite(folder, change)
    with pytest.raises(StateDictError) as caught:
        LanguageModel.from_pretrained(folder)
    text = str(caught.value)
    assert all(part in text for part in ("missing (2)", "unexpected (1)", "wrong shape (1)", "mixer.D", "wieght"))
    assert "norm_f.weight: file (31,), model (32,)" in text and "perhaps" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_reported_by_name(tmp_path, value):
    folder = copied("hf_mamba2", tmp_path / "m")
    rewrite(folder, lambda t: t["backbone.layers.1.mixer.in_proj.weight"].__setitem__((3, 4), value))
    with pytest.raises(FormatError, match=r"layers.1.mixer.in_proj.weight.*1 of \d+ weights are NaN"):
        LanguageModel.from_pretrained(folder)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")
    rewrite(folder, lambda t: t.update({"backbone.norm_f.weight": np.ones(32, np.int64)}))
    with pytest.raises(FormatError, match="int64 numbers"):
        LanguageModel.from_pretrained(folder)


def test_two_names_for_one_parameter_are_refused(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")
    rewrite(folder, lambda t: t.update({"backbone.embedding.weight": t["backbone.embeddings.weight"]}))
    with pytest.raises(FormatError, match="means the same parameter"):
        LanguageModel.from_pretrained(folder)


def test_wrong_folders_and_damaged_files_are_clear_errors(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")
    with pytest.raises(FormatError, match="no such folder"):
        LanguageModel.from_pretrained(tmp_path / "missing")
    with pytest.raises(FormatError, match="expected the folder"):
        LanguageModel.from_pretrained(folder / "config.json")
    with pytest.raises(FormatError, match="no config.json"):
        LanguageModel.from_pretrained(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            LanguageModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="holds no weights; expected one of"):
        LanguageModel.from_pretrained(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(FormatError, match="several parts"):
        LanguageModel.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(FormatError, match="not a torch file"):
        LanguageModel.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match="not a JSON object"):
        LanguageModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match="expected one of float32"):
        LanguageModel.from_pretrained(folder, dtype="int3")


def test_a_failed_save_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    build("mamba1").save_pretrained(tmp_path)
    before = logits(LanguageModel.from_pretrained(tmp_path))
    other = build("mamba1")
    other.backbone.norm_f.weight.data[:] = 5

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_safetensors", fail)
    with pytest.raises(OSError):
        other.save_pretrained(tmp_path)
    np.testing.assert_array_equal(logits(LanguageModel.from_pretrained(tmp_path)), before)


def test_ids_that_no_row_has_are_refused():
    for ids in ([[13]], [[-1]], [[]], [1], [[0.5]]):
        with pytest.raises(ShapeError):
            build("mamba1").backbone(np.array(ids))


# ------------------------------------------------------------------ fewer bits
WIDE = LanguageModelConfig(50, 32, 2, "mamba2", {"d_state": 16, "headdim": 16}, tie_embeddings=False)


@pytest.mark.parametrize("width", ["bfloat16", "int8", "int4"])
def test_weights_are_quantised_as_they_are_read_and_stay_so_when_saved(tmp_path, width):
    model = LanguageModel(WIDE, rng=np.random.default_rng(0))
    model.save_pretrained(tmp_path / "a")
    small = LanguageModel.from_pretrained(tmp_path / "a", dtype=width)
    expected = logits(quantize(model, width))
    np.testing.assert_array_equal(logits(small), expected)
    small.save_pretrained(tmp_path / "b")
    again = LanguageModel.from_pretrained(tmp_path / "b")
    np.testing.assert_array_equal(logits(again), expected)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < {"bfloat16": 0.62, "int8": 0.4, "int4": 0.3}[width] * sizes[0]
    with pytest.raises(ConfigError, match=f"stored as {width}"):
        LanguageModel.from_pretrained(tmp_path / "b", dtype="float32")
    with pytest.raises(ConfigError, match="our own format"):
        again.save_pretrained(tmp_path / "c", format="huggingface")


def test_damage_is_found_in_a_matrix_that_is_quantised(tmp_path):
    folder = copied("hf_mamba", tmp_path / "m")
    rewrite(folder, lambda t: t["backbone.layers.1.mixer.in_proj.weight"].__setitem__((3, 4), np.nan))
    with pytest.raises(FormatError, match="NaN"):
        LanguageModel.from_pretrained(folder, dtype="int8")
