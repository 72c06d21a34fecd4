"""The laws of the whole model: presets, questions, answers, banks, and files that return or are refused."""

import json

import numpy as np
import pytest

import xuracore as xc
from xuracore import io
from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuracore.nn.module import StateDictError
from xuravljepa.decoder import DecoderConfig
from xuravljepa.model import VLJEPA, parameter_counts
from xuravljepa.predictor import PredictorConfig
from xuravljepa.presets import PRESETS, VLJEPAConfig
from xuravljepa.text import TextEncoderConfig
from xuravljepa.tokenizer import PAD, SEP, TOOL
from xuravljepa.vit import VitConfig

SIZES = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8, "embed_dim": 8}
CONFIG = VLJEPAConfig(
    vision=VitConfig(image_size=16, patch_size=8, d_model=12, depth=1, n_heads=3),
    predictor=PredictorConfig(**SIZES, vision_dim=12, query_dim=10, n_visual=5, n_read=2, max_query=8),
    text=TextEncoderConfig(**SIZES, max_length=20),
    decoder=DecoderConfig(**SIZES, prefix_length=2, max_length=20),
    answers=("yes", "no", "circle", "3"),
)
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return VLJEPA(CONFIG, rng=np.random.default_rng(0)).eval()


# ---------------------------------------------------------------------- presets
def test_the_tiny_preset_answers():
    model = VLJEPA(VLJEPAConfig.tiny().replace(answers=("red", "blue")))
    assert model.answer(IMAGE, "what colour is it?") in ("red", "blue")
    assert model.parameter_count() == sum(parameter_counts(model.config).values()) < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "base"])
def test_larger_presets_build_and_read(name):
    model = VLJEPA.from_pretrained(name)
    embedding = model.embed(IMAGE, "what is it?")
    assert embedding.shape == (model.config.text.embed_dim,)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    assert model.parameter_count() == sum(parameter_counts(model.config).values())


def test_a_model_whose_decoder_learns_to_look_writes_as_before_and_is_read_back(model, tmp_path):
    looking = model.looking(np.random.default_rng(3))
    texts = [m.answer(IMAGE, "what is it?", decode=True, constrained=False) for m in (model, looking)]
    assert texts[0] == texts[1] and looking.looking() is looking
    for look in looking.y_decoder.looks:
        look.attention.out_proj.weight.data[:] = 1
    looking.save_pretrained(tmp_path)
    again = VLJEPA.from_pretrained(tmp_path)
    assert again.config.decoder.look_places == 5 and parameter_counts(again.config)["y_decoder"] == sum(
        parameter.size for parameter in again.y_decoder.parameters())
    sight = looking.predictor.sight(looking.visual_tokens(looking.pixels(IMAGE)))
    given = looking.embed(IMAGE, "what is it?")
    assert looking.answer(IMAGE, "what is it?", decode=True) == again.y_decoder.generate(
        given, allowed=CONFIG.answers, sight=sight)[0]
    with pytest.raises(ConfigError, match="look_dim and look_places are"):
        CONFIG.replace(decoder=CONFIG.decoder.replace(look_dim=7, look_places=5))


def test_the_base_preset_has_the_published_sizes():
    config = VLJEPAConfig.preset("base")
    assert round(config.vision.parameter_count / 1e6, 1) == 303.3
    p = config.predictor
    assert (p.n_layers, p.d_model, p.d_state, p.embed_dim, config.text.d_model) == (12, 1024, 128, 1536, 768)
    assert VLJEPAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_named():
    assert [VLJEPAConfig.preset(name) for name in PRESETS]
    with pytest.raises(ConfigError, match="no preset 'huge'; choose one of tiny, small, base"):
        VLJEPAConfig.preset("huge")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": CONFIG.text.replace(embed_dim=9)}, "embed_dim differs: predictor 8, text 9, decoder 8"),
        ({"predictor": CONFIG.predictor.replace(vision_dim=9)}, "vision_dim 9 is not vision.d_model 12"),
        ({"predictor": CONFIG.predictor.replace(n_visual=9)}, r"n_visual 9 is not 1 \+ 4 patches"),
        ({"std": (1.0, 0.0, 1.0)}, "std is"),
        ({"mean": (1.0, 0.0)}, "mean is"),
        ({"answers": ("yes", 3)}, r"answers\[1\] is 3"),
    ],
)
def test_parts_must_fit_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.replace(**changes)


# ---------------------------------------------------------------------- questions
def test_case_and_outer_blanks_of_a_question_do_not_matter(model):
    one, other = model.query_tokens(["is it red?"]), model.query_tokens(["  Is it RED? \n"])
    np.testing.assert_array_equal(one, other)
    assert one.shape == (1, 4, 12)  # three words and a mark


def test_tool_results_stand_between_their_marks(model):
    ids = model.tool_tokens(["17", "not for sale"])
    assert ids.shape == (2, 5, 12)
    assert ids[0, :4, 0].tolist() == [TOOL, ord("1"), SEP, PAD] and ids[1, [0, -1], 0].tolist() == [TOOL, SEP]


@pytest.mark.parametrize(
    "question, error, message",
    [
        ("", ShapeError, "the question is empty"),
        (" \n\t", ShapeError, "the question is empty"),
        ("why " * 9, ShapeError, "9 words and marks, the limit is 8"),
        ("x" * 12 * 9, ShapeError, "9 words and marks"),
        (None, DTypeError, "a question is a text, got NoneType"),
        (b"why", DTypeError, "a question is a text, got bytes"),
    ],
)
def test_questions_that_cannot_be_asked(model, question, error, message):
    with pytest.raises(error, match=message):
        model.answer(IMAGE, question)


# ---------------------------------------------------------------------- answers
def test_the_answer_is_the_nearest_of_the_known_ones(model):
    embedding = model.embed(IMAGE, "what is it?")
    answers, bank = model.answer_bank()
    assert answers == list(CONFIG.answers)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, atol=1e-6)
    cosines = model.similarities(embedding[None])
    np.testing.assert_array_equal(cosines, model.similarities(xc.Tensor(embedding[None])))
    assert model.answer(IMAGE, "what is it?") == answers[int(np.argmax(cosines))]


def test_the_decoder_answers_within_the_known_ones(model):
    assert model.answer(IMAGE, "what is it?", decode=True) in CONFIG.answers
    free = VLJEPA(CONFIG.replace(answers=()), rng=np.random.default_rng(0))
    assert isinstance(free.answer(IMAGE, "what is it?", decode=True), str)
    with pytest.raises(ConfigError, match="taught no closed set of answers; use decode=True"):
        free.answer(IMAGE, "what is it?")


def test_without_a_picture_only_the_question_counts(model):
    alone, seen = model.embed(None, "what is it?"), model.embed(IMAGE, "what is it?")
    assert abs(alone - seen).max() > 1e-4


def test_the_bank_is_computed_again_when_told():
    model = VLJEPA(CONFIG)
    before = model.answer_bank()[1]
    model.y_encoder.projection.weight.data[:] *= -1
    assert model.answer_bank()[1] is before
    model.forget_bank()
    assert abs(model.answer_bank()[1] - before).max() > 1e-3


def test_classification_takes_any_labels(model):
    label, cosines = model.classify(IMAGE, ["a cat", "a dog", "a plane"])
    assert cosines.shape == (3,) and label == ["a cat", "a dog", "a plane"][int(cosines.argmax())]
    assert model.classify(IMAGE, ("only one",))[0] == "only one"
    with pytest.raises(ShapeError, match="no labels"):
        model.classify(IMAGE, [])
    with pytest.raises(DTypeError, match="a list of texts, got the text 'a cat'"):
        model.classify(IMAGE, "a cat")


def test_retrieval_ranks_pictures_or_their_embeddings(model):
    pictures = [IMAGE, IMAGE[::-1].copy(), np.zeros((16, 16), np.uint8)]
    bank = np.stack([model.embed(picture) for picture in pictures])
    found = model.retrieve("a red circle", bank)
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert model.retrieve("a red circle", pictures, k=2) == found[:2]
    bank[1] = model.encode_answers(["a red circle"]).data[0]
    assert model.retrieve("a red circle", bank)[0] == (1, pytest.approx(1, abs=1e-5))
    with pytest.raises(ShapeError, match="the bank is empty"):
        model.retrieve("a red circle", [])
    with pytest.raises(ShapeError, match=r"the bank is \(2, 5\); expected \(n, 8\)"):
        model.retrieve("a red circle", np.ones((2, 5)))


# ---------------------------------------------------------------------- training's view
def test_the_temperature_is_kept_within_its_bounds():
    model = VLJEPA(CONFIG)
    assert model.scale == pytest.approx(1 / 0.07, rel=1e-5) and model.log_scale.shape == ()
    for given, scale in ((9.0, 100), (-3.0, 1)):
        model.log_scale.data[...] = given
        assert model.scale == pytest.approx(scale, rel=1e-5)
        model.clamp_scale()
        assert model.log_scale.item() == pytest.approx(np.log(scale), abs=1e-5)


# ---------------------------------------------------------------------- files
@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model", {"seed": "0"})
    return tmp_path / "model"


def test_a_saved_model_is_the_same_model(model, folder):
    other = VLJEPA.from_pretrained(folder)
    assert other.config == CONFIG and not other.training
    question = "how many are there?"
    np.testing.assert_array_equal(other.embed(IMAGE, question), model.embed(IMAGE, question))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def edit(folder, change):
    """Apply ``change`` to the settings of ``folder``."""
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def test_missing_files_are_named(folder):
    with pytest.raises(FormatError, match="no such folder, and no preset .presets: tiny, small, base"):
        VLJEPA.from_pretrained(folder / "nothing")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            VLJEPA.from_pretrained(folder)


def test_a_truncated_file_of_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="model.safetensors"):
            VLJEPA.from_pretrained(folder)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: s.update(model_type="bert"), FormatError, "model_type is 'bert'; expected 'xura-vljepa'"),
        (lambda s: s.pop("model_type"), FormatError, "model_type is None"),
        (lambda s: s.update(visoin={}), ConfigError, "unknown key 'visoin', did you mean 'vision'"),
        (lambda s: s["text"].update(d_modle=3), ConfigError, "unknown key 'd_modle', did you mean 'd_model'"),
        (lambda s: s["predictor"].update(n_layers="1"), ConfigError, "n_layers is '1'"),
        (lambda s: s["predictor"].update(n_layers=-1), ConfigError, "n_layers is -1"),
        (lambda s: s["vision"].update(patch_size=0), ConfigError, "patch_size is 0"),
        (lambda s: s.update(answers="yes"), ConfigError, "answers is 'yes'"),
        (lambda s: s.update(decoder=None), ConfigError, "DecoderConfig needs a JSON object"),
        (lambda s: s["predictor"].update(n_layers=2), StateDictError, r"missing \(\d+\): predictor.layers.1"),
        (lambda s: s["text"].update(d_state=6), StateDictError, "wrong shape"),
    ],
)
def test_settings_that_do_not_fit(folder, change, error, message):
    edit(folder, change)
    with pytest.raises(error, match=message):
        VLJEPA.from_pretrained(folder)


@pytest.mark.parametrize(
    "part, sizes",
    [
        ("predictor", {"d_model": 40_000}), ("predictor", {"n_layers": 10**9}),
        ("predictor", {"d_state": 10**9}), ("text", {"d_model": 40_000}), ("text", {"vocab_size": 10**12}),
        ("decoder", {"prefix_length": 10**9}), ("decoder", {"expand": 10**6}),
        ("vision", {"depth": 10**9}), ("vision", {"mlp_ratio": 1e9}),
    ],
)
def test_sizes_that_would_take_all_memory(folder, part, sizes):
    edit(folder, lambda settings: settings[part].update(sizes))
    with pytest.raises(FormatError, match="parameters or more, but model.safetensors holds"):
        VLJEPA.from_pretrained(folder)


def test_settings_that_are_no_object(folder):
    for text in ("[]", "3", '"xura-vljepa"', "{", "", '{"a": NaN}', "[" * 5000):
        (folder / "config.json").write_text(text)
        with pytest.raises(FormatError, match="config.json"):
            VLJEPA.from_pretrained(folder)


def test_foreign_weights_are_listed(folder):
    state = io.load_safetensors(folder / "model.safetensors")
    state["y_encoder.projection.bais"] = state.pop("y_encoder.projection.bias")
    io.save_safetensors(folder / "model.safetensors", state)
    with pytest.raises(StateDictError, match="perhaps 'y_encoder.projection.bais' is meant to be"):
        VLJEPA.from_pretrained(folder)
