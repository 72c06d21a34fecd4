"""DINOv2, I-JEPA and V-JEPA 2: their numbers, their names, their positions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import io, nn
from xuracore.errors import ConfigError, FormatError, ShapeError
from xuracore.io import to_bfloat16
from xuracore.nn.module import StateDictError
from xuravljepa.vit import Block, VisionTransformer, VitConfig
from xuravljepa.vit_names import canonical_state
from xuravljepa.vit_positions import Rotary, bicubic_matrix

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def part(arrays, prefix):
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def write(folder, state, settings):
    folder.mkdir(exist_ok=True)
    io.save_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def close(ours, theirs, allowed, name=""):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=allowed, err_msg=name)


def same_gradients(model, given, pixels, arrays):
    """Within 1e-5 of the largest number of each."""
    theirs = {**canonical_state(part(arrays, "gw.")), "pixels": arrays[given]}
    ours = {**{name: p.grad for name, p in model.named_parameters()}, "pixels": pixels.grad}
    assert set(theirs) == set(ours)
    for key, gradient in ours.items():
        close(gradient, theirs[key], 1e-5 * max(1.0, float(np.max(np.abs(theirs[key])))), key)


# ---------------------------------------------------------------------- the published numbers
@pytest.mark.parametrize("name", ["dinov2_base", "dinov2_swiglu"])
def test_a_dinov2(name, tmp_path):
    meta, arrays = golden(name)
    model = VisionTransformer.from_pretrained(write(tmp_path / "x", part(arrays, "w."), meta["config"]))
    assert model.family == "dinov2-hf" and model.config.layer_scale
    assert model.config.swiglu is meta["config"]["use_swiglu_ffn"]
    pixels = xc.Tensor(arrays["in.pixel_values"], requires_grad=True)
    tokens = model(pixels)
    close(tokens.data, arrays["out.last_hidden_state"], 4 * meta["ref32_maxabs"]["last_hidden_state"])
    close(tokens.data[:, 0], arrays["out.pooler_output"], 4 * meta["ref32_maxabs"]["pooler_output"])
    loss = (tokens * arrays["cot.last_hidden_state"]).sum() + (tokens[:, 0] * arrays["cot.pooler_output"]).sum()
    loss.backward()
    same_gradients(model, "gin.pixel_values", pixels, arrays)


def jepa_predictor(weights, tokens, context, target, side, config):
    """V-JEPA 2's predictor over our blocks: context and mask tokens in the order of their places."""
    width = config["pred_hidden_size"]
    shape = VitConfig(side, 1, width, 1, config["pred_num_attention_heads"], config["pred_mlp_ratio"],
                      class_token=False, class_position=False, tubelet_size=1)
    block, norm = Block(shape, rng=np.random.default_rng(0)), nn.LayerNorm(width, 1e-6)
    state = canonical_state({"encoder." + key: value for key, value in weights.items() if key.startswith("layer")})
    block.load_state_dict({key.removeprefix("blocks.0."): value for key, value in state.items() if "blocks" in key})
    norm.load_state_dict({key.removeprefix("layernorm."): weights[key] for key in weights if "layernorm" in key})
    seen = xc.ops.linear(tokens[:, context], weights["embeddings.predictor_embeddings.weight"],
                         weights["embeddings.predictor_embeddings.bias"])
    asked = xc.ops.broadcast_to(xc.Tensor(weights["embeddings.mask_tokens"][1]), shape=(len(seen), len(target), width))
    order = np.argsort(np.concatenate([context, target]))
    x = xc.ops.concatenate(seen, asked, axis=1)[:, order]
    x = norm(block(x, Rotary(np.concatenate([context, target])[order], side, width // shape.n_heads)))
    x = x[:, np.argsort(order)[len(context) :]]
    return xc.ops.linear(x, weights["proj.weight"], weights["proj.bias"])


def test_a_vjepa2_and_its_predictor(tmp_path):
    """The predictor shows that the rotary positions hold for any set of places, and carries its gradient back."""
    meta, arrays = golden("vjepa2")
    config = meta["config"]
    model = VisionTransformer.from_pretrained(write(tmp_path / "x", part(arrays, "w."), config))
    assert model.family == "vjepa2" and model.config.tubelet_size == 2 and model.config.n_tokens == 9
    video = xc.Tensor(arrays["in.pixel_values_videos"], requires_grad=True)
    tokens = model(video)
    close(tokens.data, arrays["out.last_hidden_state"], 4 * meta["ref32_maxabs"]["last_hidden_state"])
    context, target = arrays["in.context_mask"], arrays["in.target_mask"]
    predicted = jepa_predictor(part(arrays, "w.predictor."), tokens, context, target, model.config.side, config)
    allowed = 4 * meta["ref32_maxabs"]["predictor.last_hidden_state"]
    close(predicted.data, arrays["out.predictor.last_hidden_state"], allowed)
    loss = (tokens * arrays["cot.last_hidden_state"]).sum()
    (loss + (predicted * arrays["cot.predictor.last_hidden_state"]).sum()).backward()
    same_gradients(model, "gin.pixel_values_videos", video, arrays)


# ---------------------------------------------------------------------- videos and rotary positions
VIDEO = VitConfig(image_size=8, patch_size=4, d_model=12, depth=1, n_heads=2, class_token=False, class_position=False,
                  tubelet_size=2)


def test_a_picture_is_a_video_that_stands_still():
    model, pixels = VisionTransformer(VIDEO), np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    still = np.stack([pixels, pixels], axis=1)
    np.testing.assert_array_equal(model(pixels).data, model(still).data)
    np.testing.assert_array_equal(model(still[:, :1]).data, model(still).data)
    assert model(np.concatenate([still, still], axis=1)).shape == (2, 8, 12)


def test_videos_that_do_not_fit_are_named():
    model = VisionTransformer(VIDEO)
    for frames in (0, 3):
        with pytest.raises(ShapeError, match=f"video of {frames} frames; expected a multiple of 2"):
            model(np.zeros((1, frames, 3, 8, 8), np.float32))
    with pytest.raises(ShapeError, match="or .batch, frames, 3, height, width"):
        model(np.zeros((1, 3, 2, 8, 8), np.float32))
    with pytest.raises(ShapeError, match=r"expected \(batch, 3, height, width\)$"):
        VisionTransformer(VitConfig.tiny())(np.zeros((1, 2, 3, 64, 64), np.float32))


def test_rotary_angles_against_the_definition():
    """Each output written out: neighbours are pairs, their two rates are tiled, not repeated."""
    width, side, ids = 14, 3, np.array([0, 5, 9, 26])
    x = np.random.default_rng(0).standard_normal((1, 1, 4, width))
    expected = x.copy()
    for row, number in enumerate(ids):
        for axis, place in enumerate((number // 9, number % 9 // 3, number % 3)):
            for i in range(4):
                angle = place * 10000 ** (-(i % 2) / 2)
                other = x[0, 0, row, 4 * axis + (i ^ 1)] * (1 if i % 2 else -1)
                mine = x[0, 0, row, 4 * axis + i]
                expected[0, 0, row, 4 * axis + i] = mine * np.cos(angle) + other * np.sin(angle)
    close(Rotary(ids, side, width, np.float64)(xc.Tensor(x)).data, expected, 1e-12)


def test_gradients_of_every_part_in_float64():
    """Registers, layer scale, gates, normalised queries, an interpolated table; tubelets."""
    rng = np.random.default_rng(0)
    full = VitConfig(image_size=4, patch_size=2, d_model=8, depth=1, n_heads=2, class_position=False, registers=2,
                     layer_scale=True, swiglu=True, qk_norm=True, interpolation="dinov2")
    assert xc.gradcheck(VisionTransformer(full).to_dtype(np.float64), [rng.standard_normal((1, 3, 4, 6))])
    clip = VIDEO.replace(image_size=4, patch_size=2)
    assert xc.gradcheck(VisionTransformer(clip).to_dtype(np.float64), [rng.standard_normal((1, 2, 3, 4, 4))])


VARIANTS = {
    "class": {}, "no class": {"class_token": False, "class_position": False}, "registers": {"registers": 3},
    "no row for the class": {"class_position": False, "registers": 1}, "layer scale": {"layer_scale": True},
    "gates": {"swiglu": True, "mlp_ratio": 1.5}, "q and k norms": {"qk_norm": True},
    "video": {"class_token": False, "class_position": False, "tubelet_size": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_counts_its_parameters_and_survives_a_file(variant, tmp_path):
    config = VitConfig(image_size=8, patch_size=4, d_model=12, depth=2, n_heads=2).replace(**VARIANTS[variant])
    model = VisionTransformer(config, rng=np.random.default_rng(1))
    assert config.parameter_count == model.parameter_count()
    model.licence = "cc-by-4.0"
    model.save_pretrained(tmp_path)
    if variant == "video":  # no tensor shows the size of the grid, so it must be said
        assert json.loads((tmp_path / "config.json").read_text())["image_size"] == 8
    other = VisionTransformer.from_pretrained(tmp_path)
    assert other.config == config and other.family == "xura" and other.licence == "cc-by-4.0"
    assert other.preprocessing == model.preprocessing
    pixels = np.ones((1, 3, 8, 8), np.float32)
    assert model(pixels).shape == (1, config.n_tokens, 12)
    np.testing.assert_array_equal(model(pixels).data, other(pixels).data)


# ---------------------------------------------------------------------- positions
def test_three_conventions_of_interpolation():
    """A unit impulse, by hand: the slope of the kernel and the spacing of the places tell them apart."""
    def weights(at, slope):
        d = np.abs(at - np.arange(int(at) - 1, int(at) + 3))
        near = (slope + 2) * d**3 - (slope + 3) * d**2 + 1
        return np.where(d <= 1, near, slope * (d**3 - 5 * d**2 + 8 * d - 4))

    close(bicubic_matrix(4, 8, "hf")[4], weights(1.75, -0.75), 1e-6)  # (4 + ½) 4/8 - ½
    close(bicubic_matrix(4, 8, "timm")[4], weights(1.75, -0.5), 1e-6)
    at = 14.5 * 37 / 16.1 - 0.5  # DINOv2's places: old / (new + 0.1) apart
    close(bicubic_matrix(37, 16, "dinov2")[14, int(at) - 1 : int(at) + 3], weights(at, -0.75), 1e-5)
    spread = bicubic_matrix(37, 16, "timm")  # antialiased: a new place sees all it covers
    assert (np.abs(spread[8]) > 1e-3).sum() > 4 == (np.abs(bicubic_matrix(37, 16)[8]) > 1e-3).sum()
    with pytest.raises(ConfigError, match="interpolation is 'lanczos'; choose one of hf, timm, dinov2"):
        VitConfig(interpolation="lanczos")


@pytest.mark.parametrize("how", ["hf", "timm", "dinov2"])
def test_a_model_brought_to_another_size_gives_what_it_gave(how):
    config = VitConfig(image_size=20, patch_size=4, d_model=12, depth=1, n_heads=2, registers=2, interpolation=how)
    model = VisionTransformer(config)
    model.pos_embed.data[...] = np.random.default_rng(2).standard_normal(model.pos_embed.shape)
    small, pixels = model.at_size(12), np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    assert small.config.n_tokens == 12 and model.at_size(20) is model
    close(small(pixels).data, model(pixels).data, 1e-6)
    with pytest.raises(ConfigError, match="rotary positions are those of 8 pixels, not 16"):
        VisionTransformer(VIDEO).at_size(16)


# ---------------------------------------------------------------------- names
HF = [  # timm → Hugging Face's DINOv2 as on the hub
    (r"blocks\.(\d+)\.norm", r"encoder.layer.\1.norm"), (r"blocks\.(\d+)\.mlp\.", r"encoder.layer.\1.mlp."),
    (r"blocks\.(\d+)\.ls(.)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (r"^cls_token", "embeddings.cls_token"), (r"^reg_token", "embeddings.register_tokens"),
    (r"^pos_embed", "embeddings.position_embeddings"), (r"^norm\.", "layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
]
GATES = [(r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out")]
ORIGINAL = [(r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"), ("reg_token", "register_tokens")]


def renamed(state, *tables):
    def rename(name):
        for pattern, target in (rule for table in tables for rule in table):
            name = re.sub(pattern, target, name)
        return name

    return {rename(name): array for name, array in state.items()}


def split(state, whole="attn.qkv", pieces=("attn.query", "attn.key", "attn.value")):
    rest = {name: array for name, array in state.items() if whole not in name}
    return rest | {name.replace(whole, piece): half for name, array in state.items() if whole in name
                   for piece, half in zip(pieces, np.split(array, len(pieces)))}


def giant():
    """A small model with all that DINOv2's largest has."""
    config = VitConfig(image_size=8, patch_size=4, d_model=12, depth=2, n_heads=2, registers=2, layer_scale=True,
                       swiglu=True, mlp_ratio=1.5)
    rng, state = np.random.default_rng(3), VisionTransformer(config).state_dict()
    return {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in state.items()}


def dinov2_names():
    state, mask = giant(), {"mask_token": np.zeros((1, 12), np.float32)}
    hub = renamed(split(state), HF)
    five = renamed(split(renamed(split(state), HF), "mlp.fc1", ("mlp.gate_proj", "mlp.up_proj")),
                   [(r"mlp\.fc2", "mlp.down_proj"), (r"attention\.attention\.(.)\w+", r"attention.\1_proj"),
                    (r"attention\.output\.dense", "attention.o_proj")])
    no_row = {**state, "pos_embed": state["pos_embed"][:, 1:]}
    return {
        "hub": ("dinov2-hf", renamed(hub, GATES)), "transformers 5": ("dinov2-hf", five),
        "hub, classifier": ("dinov2-hf", {"dinov2_with_registers." + n: a for n, a in renamed(hub, GATES).items()}
                            | {"classifier.weight": np.zeros((2, 24), np.float32)}),
        "original": ("dinov2", renamed(state, ORIGINAL) | mask), "timm": ("timm", no_row),
    }


@pytest.mark.parametrize("kind", dinov2_names())
def test_every_family_of_dinov2_names_gives_one_state(kind, tmp_path):
    family, stored = dinov2_names()[kind]
    model = VisionTransformer.from_pretrained(write(tmp_path / "x", stored, {"num_attention_heads": 2}))
    assert model.family == family and model.config.interpolation == "timm"  # because of the registers
    assert model.config.class_position is (kind != "timm") and model.config.swiglu and model.config.registers == 2
    for name, array in model.state_dict().items():
        expected = giant()[name][:, 1:] if kind == "timm" and name == "pos_embed" else giant()[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_conventions_follow_the_family(tmp_path):
    plain = {name: array for name, array in giant().items() if name != "reg_token"}
    original = plain | {"mask_token": np.zeros((1, 12), np.float32)}
    jepa = {f"encoder.{name}": array for name, array in plain.items() if name != "cls_token"}
    jepa["encoder.pos_embed"] = plain["pos_embed"][:, 1:]
    for stored, family, how in ((plain, "timm", "timm"), (original, "dinov2", "dinov2"), (jepa, "ijepa", "hf"),
                                (renamed(split(plain), HF, GATES), "dinov2-hf", "hf")):
        model = VisionTransformer.from_pretrained(write(tmp_path / family, stored, {"num_heads": 2}))
        assert (model.family, model.config.interpolation) == (family, how)
        assert model.config.n_tokens == 4 + (family != "ijepa")


def test_shards_and_halves(tmp_path):
    """BF16 in two shards, F16 in one file: rounded, then the same numbers."""
    state = giant()
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(state)
    where = {}
    for i, chosen in enumerate((names[::2], names[1::2])):
        bits = {name: to_bfloat16(state[name]) for name in chosen}
        io.save_safetensors(folder / f"model-{i}.safetensors", bits, bfloat16=chosen)
        where |= dict.fromkeys(chosen, f"model-{i}.safetensors")
    io.save_json(folder / "model.safetensors.index.json", {"weight_map": where})
    (folder / "config.json").write_text('{"num_heads": 2, "registers": 2}')
    model = VisionTransformer.from_pretrained(folder)
    half = {name: array.astype(np.float16) for name, array in state.items()}
    other = VisionTransformer.from_pretrained(write(tmp_path / "half", half, {"num_heads": 2}))
    for name, array in state.items():
        assert model.state_dict()[name].dtype == other.state_dict()[name].dtype == np.float32
        np.testing.assert_allclose(model.state_dict()[name], array, rtol=2**-8)
        np.testing.assert_array_equal(other.state_dict()[name], half[name])


def test_what_does_not_fit_is_listed(tmp_path):
    def load(state, **settings):
        return VisionTransformer.from_pretrained(write(tmp_path / "x", state, {"num_heads": 2, **settings}))

    state = giant()
    with pytest.raises(StateDictError, match=r"unexpected \(1\): extra[\s\S]*missing \(1\): blocks.1.ls2.gamma"):
        load({name: a for name, a in state.items() if name != "blocks.1.ls2.gamma"} | {"extra": state["norm.bias"]})
    with pytest.raises(FormatError, match=r"only \['gate'\] of gate, up"):
        load(renamed(state, [(r"blocks\.(.)\.mlp\.fc1", r"encoder.layer.\1.mlp.gate_proj")]))
    with pytest.raises(FormatError, match="7 places, which is no square"):
        load({**state, "pos_embed": np.zeros((1, 8, 12), np.float32)})
    with pytest.raises(FormatError, match="these are not the tensors of a Vision Transformer"):
        load({**state, "reg_token": np.zeros(3, np.float32)})
    clip = {name: a for name, a in state.items() if name not in ("cls_token", "reg_token", "pos_embed")}
    clip["patch_embed.proj.weight"] = np.zeros((12, 3, 2, 4, 4), np.float32)
    with pytest.raises(FormatError, match="names no crop_size"):
        load(clip)
    assert load(clip, crop_size=16).config.n_patches == 16
