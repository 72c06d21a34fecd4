"""Sessions keep their state, bad input does not harm it, and what is saved comes back."""

import json

import numpy as np
import pytest

from xuracore import jit
from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuramamba.wavecore import CoreModelConfig, inference_router, inference_variables, make_core_model
from xuramamba.wavecore.checkpoint import load_model, save_model
from xuramamba.wavecore.export import export_model, load_export
from xuramamba.wavecore.parameters import flatten
from xuramamba.wavecore.session import InferenceRouter, dequantize_int8, int8_error, quantize_int8

CONFIG = CoreModelConfig.seed(d_s=24, d_w=16, d_p=8, d_e=16, d_k=8, d_c=16, cms_sizes=(4, 5, 6), cms_dims=(8, 12, 16))
MODEL, VARIABLES = make_core_model(0, 9, 3, 3, CONFIG)
RNG = np.random.default_rng(0)
OBS, ACTIONS, REWARDS = RNG.standard_normal((8, 9)), RNG.standard_normal((8, 3)), np.array([0, 1.0] * 4)


def run(router, session, count=8):
    return np.array([router.infer(OBS[t], ACTIONS[t], REWARDS[t], session=session)[0] for t in range(count)])


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_session_is_the_sequence(backend):
    router = InferenceRouter(MODEL, VARIABLES, backend)
    expected, _ = MODEL.sequence(inference_variables(VARIABLES), OBS[None], ACTIONS[None], REWARDS[None, :, None])
    session = router.session()
    np.testing.assert_allclose(run(router, session), expected[0], rtol=2e-4, atol=2e-5)
    assert np.abs(run(router, session) - expected[0]).max() > 1e-3  # it goes on; it does not begin anew
    router.reset(session)
    np.testing.assert_allclose(run(router, session), expected[0], rtol=2e-4, atol=2e-5)


def test_sessions_do_not_see_each_other_and_backends_hand_over():
    router = InferenceRouter(MODEL, VARIABLES)
    alone, one, two = router.session(), router.session(), router.session()
    expected, mixed = run(router, alone), []
    for t in range(8):
        mixed.append(router.infer(OBS[t], ACTIONS[t], REWARDS[t], ("numpy", "auto")[t % 2], session=one)[0])
        router.infer(-OBS[t], ACTIONS[t], session=two)
    np.testing.assert_allclose(mixed, expected, rtol=2e-4, atol=2e-5)


def test_a_backend_that_cannot_run_falls_back():
    model, variables = make_core_model(0, 9, 3, 3, CONFIG.replace(core="seed"))
    y, about = InferenceRouter(model, variables).infer(OBS[0], ACTIONS[0], backend="numba")
    assert about == {"backend": "numpy", "backend_available": False} and y.shape == (3,)
    expected = "numba" if jit.backend() == "numba" else "numpy"
    for name in ("auto", "hailo", "cpu"):
        assert InferenceRouter(MODEL, VARIABLES, name).infer(OBS[0], ACTIONS[0])[1] == {
            "backend": expected, "backend_available": True}
    with pytest.raises(ConfigError, match="backend"):
        InferenceRouter(MODEL, VARIABLES, "cuda")


@pytest.mark.parametrize("obs, action, reward, error", [
    (np.full(9, np.nan), np.zeros(3), 0, DTypeError), (np.zeros(9), np.array([0, np.inf, 0]), 0, DTypeError),
    (np.zeros(9), np.zeros(3), np.nan, DTypeError), (np.zeros(8), np.zeros(3), 0, ShapeError),
    (np.zeros(9), np.zeros((1, 3)), 0, ShapeError), (["a"] * 9, np.zeros(3), 0, DTypeError),
    (np.full(9, 1e30), np.zeros(3), 0, DTypeError), (np.zeros(9), np.zeros(3), [0, 1], ShapeError),
])  # fmt: skip
def test_bad_input_leaves_the_session_as_it_was(obs, action, reward, error):
    router = InferenceRouter(MODEL, VARIABLES)
    session, other = router.session(), router.session()
    run(router, session, 4), run(router, other, 4)
    with pytest.raises(error):
        router.infer(obs, action, reward, session=session)
    assert session.steps == 4
    np.testing.assert_array_equal(run(router, session), run(router, other))


def test_the_largest_input_leaves_finite_states():
    router = InferenceRouter(MODEL, VARIABLES)
    for sign in (1, -1, 1):
        y, _ = router.infer(np.full(9, sign * 1e6), np.full(3, 1e6), 1e6)
    assert np.isfinite(y).all()
    assert all(np.isfinite(x).all() for x in router.default_session.as_state()[:3])


def test_the_clock_does_not_go_back():
    router = InferenceRouter(MODEL, VARIABLES)
    router.infer(OBS[0], ACTIONS[0], timestamp=1.0)
    router.infer(OBS[0], ACTIONS[0], timestamp=1.0)
    for wrong in (0.9, float("nan")):
        with pytest.raises(ConfigError, match="time does not go back"):
            router.infer(OBS[0], ACTIONS[0], timestamp=wrong)
    router.reset()
    router.infer(OBS[0], ACTIONS[0], timestamp=0.0)


def test_int8_is_within_its_bound():
    small, scales = quantize_int8(VARIABLES["params"])
    back = flatten(dequantize_int8(small, scales))
    for name, x in flatten(inference_variables(VARIABLES)["params"]).items():
        bound = scales[name] / 2 * (1 + 1e-5) if name in scales else 0
        assert (np.abs(back[name] - x) <= bound).all(), name
    errors = int8_error(MODEL, VARIABLES["params"])
    assert errors["max_weight_error"] <= errors["weight_error_bound"]
    assert 0 < errors["max_output_error"] < 0.2


# ---------------------------------------------------------------------- files
def saved(folder):
    save_model(folder, MODEL, VARIABLES, {"final_loss": 0.5, "rlds_episodes": 3})
    return folder


def test_a_checkpoint_comes_back_with_its_manifest(tmp_path):
    model, variables = load_model(saved(tmp_path))
    assert model.config == CONFIG and (model.obs_dim, model.action_dim, model.output_dim) == (9, 3, 3)
    own, theirs = flatten(VARIABLES["params"]), flatten(variables["params"])
    assert list(own) == list(theirs) and all((own[n].data == theirs[n].data).all() for n in own)
    about = json.loads((tmp_path / "manifest.json").read_text())
    assert list(about) == ["version", "phase", "timestamp", "model_type", "param_count", "scaffold", "embedding",
                           "target", "training"]
    assert about["param_count"] == MODEL.param_count(VARIABLES)
    assert about["training"] == {"final_loss": 0.5, "rlds_episodes": 3}


def corrupt_weights(folder):
    path = folder / "wavecore_seed.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def lose_the_end(folder):
    path = folder / "wavecore_seed.npz"
    path.write_bytes(path.read_bytes()[:-1000])


def poison(folder):
    model, variables = load_model(folder)
    variables["params"]["cms"]["mix"]["bias"].data[0] = np.nan
    save_model(folder, model, variables, {"final_loss": 0.5, "rlds_episodes": 3})


def lie(folder):
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | {"param_count": 172203}))


def resize(folder):
    about = json.loads((folder / "config.json").read_text())
    about["config"]["d_s"] = 32
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("damage", [corrupt_weights, lose_the_end, poison, lie, resize])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    damage(saved(tmp_path))
    with pytest.raises(FormatError):
        load_model(tmp_path)


@pytest.mark.parametrize("quantization, tolerance", [(None, 0), ("fp16", 2e-3), ("int8", 0.1)])
def test_an_export_comes_back_with_its_whole_configuration(quantization, tolerance, tmp_path):
    about = export_model(tmp_path, MODEL, VARIABLES, quantization, arch_preset="seed")
    assert {"model_type", "checkpoint_path", "config", "input_dims", "output_dim", "quantization", "backend", "format",
            "arch_preset", "sparsity_lambda", "compact"} <= set(about)
    model, variables = load_export(tmp_path)
    assert model.config == CONFIG
    one, two = flatten(VARIABLES["params"]), flatten(variables["params"])
    assert max(np.abs(one[name].data - two[name]).max() for name in one) <= tolerance
    y, _ = InferenceRouter.from_pretrained(tmp_path).infer(OBS[0], ACTIONS[0])
    assert y.shape == (3,)


def test_the_command_times_a_model(tmp_path, capsys):
    saved(tmp_path)
    assert inference_router.main(["--model-path", str(tmp_path), "--backend", "numpy", "--steps", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "numpy"
    assert inference_router.main(["--model-path", str(tmp_path), "--obs-dim", "5"]) == 2
    assert "the model has 9" in capsys.readouterr().err
