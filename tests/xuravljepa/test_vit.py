"""The X-Encoder equals the published ViT, whoever saved its weights, and refuses what is no ViT."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import io
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuracore.nn.module import StateDictError
from xuravljepa.vit import VisionTransformer, VitConfig
from xuravljepa.vit_names import canonical_state
from xuravljepa.vit_positions import bicubic_matrix, sine_positions

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = VitConfig(image_size=8, patch_size=4, d_model=12, depth=2, n_heads=3, mlp_ratio=1.5)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def part(arrays, prefix):
    """{name: array} of the keys that begin with ``prefix``."""
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def write(folder, state, settings):
    folder.mkdir(exist_ok=True)
    io.save_safetensors(folder / "model.safetensors", state)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


# ---------------------------------------------------------------------- the published numbers
@pytest.mark.parametrize("name", ["vit_base", "vit_interp"])
def test_a_hugging_face_vit(name, tmp_path):
    """Values, and gradients with respect to pixels and every weight; vit_interp has another image size."""
    meta, arrays = golden(name)
    model = VisionTransformer.from_pretrained(write(tmp_path / "vit", part(arrays, "w."), meta["config"]))
    assert model.config.norm_eps == 1e-12 and model.config.n_heads == meta["config"]["num_attention_heads"]
    pixels = xc.Tensor(arrays["in.pixel_values"], requires_grad=True)
    tokens = model(pixels)
    expected = arrays["out.last_hidden_state"]
    tolerance = 4 * meta["ref32_maxabs"]["last_hidden_state"]
    np.testing.assert_allclose(tokens.data, expected, rtol=0, atol=tolerance)

    pooler = {n: xc.Tensor(arrays[f"w.pooler.dense.{n}"]) for n in ("weight", "bias")}
    pooled = xc.ops.tanh(xc.ops.linear(tokens[:, 0], pooler["weight"], pooler["bias"]))
    tolerance = 4 * meta["ref32_maxabs"]["pooler_output"]
    np.testing.assert_allclose(pooled.data, arrays["out.pooler_output"], rtol=0, atol=tolerance)

    loss = (tokens * arrays["cot.last_hidden_state"]).sum() + (pooled * arrays["cot.pooler_output"]).sum()
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {**canonical_state(part(arrays, "gw.")), "pixels": arrays["gin.pixel_values"]}
    assert set(theirs) == {*ours, "pixels"}
    for key, gradient in {**ours, "pixels": pixels.grad}.items():
        scale = max(1.0, float(np.max(np.abs(theirs[key]))))
        np.testing.assert_allclose(gradient, theirs[key], rtol=1e-5, atol=1e-5 * scale, err_msg=key)


def test_gradients_in_float64():
    rng = np.random.default_rng(0)
    model = VisionTransformer(VitConfig(image_size=4, patch_size=2, d_model=8, depth=1, n_heads=2))
    assert xc.gradcheck(model.to_dtype(np.float64), [rng.standard_normal((1, 3, 4, 6))])


def test_published_sizes():
    sizes = {"S/16": VitConfig.small(), "B/16": VitConfig(), "L/16": VitConfig.large()}
    millions = {name: round(config.parameter_count / 1e6, 2) for name, config in sizes.items()}
    assert millions == {"S/16": 21.67, "B/16": 85.80, "L/16": 303.30}


@pytest.mark.parametrize("config", [TINY, TINY.replace(qkv_bias=False), VitConfig.tiny()])
def test_the_arithmetic_counts_what_the_model_has(config):
    assert config.parameter_count == VisionTransformer(config).parameter_count()


# ---------------------------------------------------------------------- positions
def test_interpolation_to_the_same_size_changes_nothing_and_rows_sum_to_one():
    np.testing.assert_allclose(bicubic_matrix(7, 7), np.eye(7), atol=1e-7)
    for old, new in ((4, 9), (9, 4), (1, 3), (3, 1)):
        np.testing.assert_allclose(bicubic_matrix(old, new).sum(axis=1), 1, atol=1e-6)


def test_bicubic_weights_halfway_between_two_places():
    """0.59375 at distance 1/2 and -0.09375 at 3/2; the place before the first is the first again."""
    row = bicubic_matrix(4, 2)[0]  # its centre lies at 0.5
    np.testing.assert_allclose(row, [-0.09375 + 0.59375, 0.59375, -0.09375, 0], atol=1e-7)


def test_a_constant_table_stays_constant_at_every_size():
    model = VisionTransformer(TINY)
    model.pos_embed.data[:, 1:] = 0.5
    for rows, columns in ((2, 2), (3, 1), (5, 4)):
        table = model._positions(rows, columns)
        assert table.shape == (1, 1 + rows * columns, 12)
        np.testing.assert_allclose(table.data[:, 1:], 0.5, atol=1e-6)
        np.testing.assert_array_equal(table.data[:, 0], model.pos_embed.data[:, 0])


@pytest.mark.parametrize("dim", [16, 18])
def test_starting_positions_depend_on_distance_alone(dim):
    table = sine_positions(5, dim)[0]
    assert table.shape == (26, dim) and table.dtype == np.float32 and not table[0].any()
    grid = table[1:].reshape(5, 5, dim)
    products = [grid[i, j] @ grid[i + 1, j + 2] for i in range(4) for j in range(3)]
    np.testing.assert_allclose(products, products[0], rtol=1e-5)


# ---------------------------------------------------------------------- names
def model_state():
    rng = np.random.default_rng(1)
    shapes = {name: array.shape for name, array in VisionTransformer(TINY).state_dict().items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


HUB = [  # Hugging Face's ViT, the files on the hub
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
]
V5 = [  # what transformers 5 saves
    (r"encoder\.layer\.(\d+)\.layernorm", r"layers.\1.layernorm"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"layers.\1.attention.o_proj."),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.(.)\w+\.", r"layers.\1.attention.\2_proj."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"layers.\1.mlp.fc1."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"layers.\1.mlp.fc2."),
]


def split_qkv(state):
    split = {}
    for name, array in state.items():
        if ".qkv." in name:
            for piece, values in zip(("query", "key", "value"), np.split(array, 3)):
                split[name.replace("qkv", piece)] = values
        else:
            split[name] = array
    return split


def renamed(state, rules):
    def rename(name):
        for pattern, target in rules:
            name = re.sub(pattern, target, name)
        return name

    return {rename(name): array for name, array in state.items()}


def families():
    state = model_state()
    hub = renamed(split_qkv(state), HUB)
    five = renamed(hub, V5)
    assert {"encoder.layer.1.attention.attention.query.weight", "layernorm.bias"} <= set(hub)
    assert {"layers.1.attention.q_proj.weight", "layers.0.mlp.fc2.bias"} <= set(five)
    heads = {name: np.zeros(12, np.float32) for name in ("classifier.weight", "pooler.dense.bias")}
    return {
        "timm": {**state, "head.weight": np.zeros((2, 12), np.float32), "head.bias": np.zeros(2, np.float32)},
        "timm in OpenCLIP": {f"visual.trunk.{name}": array for name, array in state.items()},
        "I-JEPA": {f"encoder.{name}": array for name, array in state.items()},
        "I-JEPA, data parallel": {f"module.backbone.{name}": array for name, array in state.items()},
        "hub": {**hub, **heads, "embeddings.mask_token": np.zeros((1, 1, 12), np.float32)},
        "hub, with a task on top": {**{f"vit.{name}": array for name, array in hub.items()}, **heads},
        "transformers 5": {**five, **heads},
    }


@pytest.mark.parametrize("family", families())
def test_every_family_of_names_gives_one_state(family):
    expected, found = model_state(), canonical_state(families()[family])
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def test_every_family_gives_one_model(tmp_path):
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    settings = {"n_heads": 3, "num_attention_heads": 3, "num_heads": 3, "layer_norm_eps": 1e-6}
    results = []
    for i, state in enumerate(families().values()):
        folder = write(tmp_path / str(i), state, settings)
        results.append(VisionTransformer.from_pretrained(folder)(pixels).data)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


FOREIGN = {
    "blocks.0.attn.qkv.weight norm_pre.weight": "CLIP",
    "vision_model.pre_layrnorm.weight": "CLIP",
    "embeddings.class_embedding encoder.layers.0.self_attn.q_proj.weight": "CLIP",
    "visual.conv1.weight visual.ln_pre.weight": "CLIP",
    "visual.transformer.resblocks.0.ln_1.weight": "CLIP",
    "blocks.0.attn.qkv.weight attn_pool.latent": "SigLIP",
    "vision_model.encoder.layers.0.layer_norm1.weight vision_model.head.probe": "SigLIP",
    "encoder.layers.0.self_attn.q_proj.weight head.probe": "SigLIP",
    "blocks.0.attn.q_bias rope.bands": "EVA",
    "blocks.0.mlp.fc1_g.weight": "EVA",
    "layer.0.attention.q_proj.weight embeddings.patch_embeddings.weight": "DINOv3",
    "blocks.0.attn.qkv.weight rope_embed.periods": "DINOv3",
    "blocks.0.attn.relative_position_bias_table": "BEiT",
    "encoder.layer.0.lambda_1": "BEiT",
    "embeddings.distillation_token": "DeiT",
}


@pytest.mark.parametrize("names", FOREIGN)
def test_another_tower_is_refused_by_its_name(names, tmp_path):
    state = {name: np.zeros((2, 2), np.float32) for name in ("cls_token", *names.split())}
    folder = write(tmp_path / "foreign", state, {})
    with pytest.raises(FormatError, match=f"this is .*{FOREIGN[names]}.*which needs another") as caught:
        VisionTransformer.from_pretrained(folder)
    assert str(folder) in str(caught.value) and caught.value.entry in names


@pytest.mark.parametrize("settings, family", [
    ({"architecture": "vit_base_patch16_siglip_gap_224"}, "SigLIP"), ({"model_type": "clip_vision_model"}, "CLIP"),
    ({"architecture": "eva02_tiny_patch14_224"}, "EVA"), ({"model_type": "dinov3_vit"}, "DINOv3")])
def test_a_tower_with_plain_names_is_refused_by_its_settings(settings, family, tmp_path):
    with pytest.raises(FormatError, match=f"this is .*{family}"):
        VisionTransformer.from_pretrained(write(tmp_path / "foreign", model_state(), settings))


# ---------------------------------------------------------------------- files
def test_a_saved_model_is_the_same_model(tmp_path):
    config = TINY.replace(activation="silu", norm_eps=1e-4, qkv_bias=False)
    model = VisionTransformer(config, rng=np.random.default_rng(5))
    model.save_pretrained(tmp_path / "a" / "b")
    other = VisionTransformer.from_pretrained(tmp_path / "a" / "b")
    assert other.config == config
    pixels = np.random.default_rng(0).standard_normal((2, 3, 8, 12)).astype(np.float32)
    np.testing.assert_array_equal(model(pixels).data, other(pixels).data)


def test_heads_are_asked_for_where_nothing_shows_them(tmp_path):
    with pytest.raises(FormatError, match="no number of heads .* for 12 features"):
        VisionTransformer.from_pretrained(write(tmp_path / "x", model_state(), None))
    timm = {"architecture": "vit_small", "num_features": 12, "model_args": {"num_heads": 4}}
    assert VisionTransformer.from_pretrained(write(tmp_path / "y", model_state(), timm)).config.n_heads == 4


def test_settings_that_change_the_numbers_are_heeded(tmp_path):
    hub = families()["hub"]
    settings = {"num_attention_heads": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}
    config = VisionTransformer.from_pretrained(write(tmp_path / "x", hub, settings)).config
    assert config.activation == "gelu_tanh" and config.norm_eps == 1e-3
    without = VisionTransformer.from_pretrained(write(tmp_path / "y", hub, {"num_attention_heads": 3})).config
    assert without.activation == "gelu" and without.norm_eps == 1e-12


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ([1, 2], FormatError, "holds a list"),
        ({"num_attention_heads": "3"}, ConfigError, "n_heads is '3'"),
        ({"num_attention_heads": 0}, ConfigError, "n_heads is 0; expected at least 1"),
        ({"num_attention_heads": -3}, ConfigError, "n_heads is -3"),
        ({"num_attention_heads": 5}, ConfigError, "d_model 12 is not a multiple of n_heads 5"),
        ({"num_attention_heads": 3, "layer_norm_eps": -1}, ConfigError, "norm_eps -1.0 must be positive"),
        ({"num_attention_heads": 3, "hidden_act": "quick_gelu"}, ConfigError, "'quick_gelu'; choose one of"),
        ({"num_attention_heads": 3, "hidden_act": ["gelu"]}, ConfigError, "activation is"),
    ],
)
def test_hostile_settings(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        VisionTransformer.from_pretrained(write(tmp_path / "x", model_state(), settings))


def test_hostile_tensors(tmp_path):
    def load(state):
        return VisionTransformer.from_pretrained(write(tmp_path / "x", state, {"n_heads": 3}))

    good = model_state()
    with pytest.raises(FormatError, match="not the tensors of a Vision Transformer"):
        load({"weight": np.zeros(3, np.float32)})
    with pytest.raises(FormatError, match="not the tensors of a Vision Transformer"):
        load({**good, "pos_embed": np.zeros((5, 12), np.float32)})
    with pytest.raises(StateDictError, match=r"missing \(1\): norm.weight"):
        load({name: array for name, array in good.items() if name != "norm.weight"})
    with pytest.raises(StateDictError, match=r"unexpected \(1\): extra"):
        load({**good, "extra": np.zeros(1, np.float32)})
    with pytest.raises(StateDictError, match=r"blocks.1.norm2.bias: file \(13,\), model \(12,\)"):
        load({**good, "blocks.1.norm2.bias": np.zeros(13, np.float32)})
    with pytest.raises(StateDictError, match="missing"):
        load({**good, "blocks.999999999.norm1.bias": np.zeros(12, np.float32)})
    hub = families()["hub"]
    del hub["encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(FormatError, match=r"only \['query', 'value'\]"):
        load(hub)
    hub["encoder.layer.0.attention.attention.key.weight"] = np.zeros((5, 12), np.float32)
    with pytest.raises(FormatError, match="differ in shape"):
        load(hub)
    with pytest.raises(FormatError, match="two tensors for 'cls_token'"):
        load({**good, "module.cls_token": good["cls_token"]})


def test_a_shape_that_asks_for_all_memory_is_refused(tmp_path):
    """Twelve megabytes of patch weights would mean a model of twelve terabytes."""
    width = 1_000_002
    state = {**model_state(), "patch_embed.proj.weight": np.zeros((width, 3, 1, 1), np.float16)}
    with pytest.raises(FormatError, match="parameters, but it holds"):
        VisionTransformer.from_pretrained(write(tmp_path / "x", state, {"n_heads": 3}))


def test_images_that_do_not_fit_are_named():
    model = VisionTransformer(TINY)
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\); expected \(batch, 3, height, width\)"):
        model(np.zeros((3, 8, 8), np.float32))
    for height, width in ((9, 8), (8, 0)):
        with pytest.raises(ShapeError, match=f"{height} × {width} pixels; both must be positive multiples"):
            model(np.zeros((1, 3, height, width), np.float32))
    with pytest.raises(ConfigError, match="patch_size is 0"):
        VitConfig(patch_size=0)
    with pytest.raises(ConfigError, match="image_size 10 is not a multiple of patch_size 4"):
        VitConfig(image_size=10, patch_size=4)
