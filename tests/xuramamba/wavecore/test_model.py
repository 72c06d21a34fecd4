"""The model: its size, its shapes, its gradient, and the same numbers whichever way it is called."""

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops
from xuracore.errors import ConfigError, ShapeError, XuraError
from xuramamba.wavecore import BatchDimensionError, CoreModelConfig, inference_variables, make_core_model
from xuramamba.wavecore.encoder import world_model_loss
from xuramamba.wavecore.parameters import arrays, flatten, parameters, unflatten

SMALL = CoreModelConfig(
    d_s=6, d_w=8, d_p=4, d_e=8, d_k=3, d_c=8, num_levels=2, cms_sizes=(3, 4), cms_dims=(5, 6), cms_decays=(0.2, 0.1),
    mamba_state_dim=2, use_object_slot=True,
)  # fmt: skip


def built(config=SMALL, sizes=(5, 2, 3), seed=0, dtype=None):
    model, variables = make_core_model(seed, *sizes, config)
    return model, {"params": parameters(variables["params"], dtype)}


def example(model, batch, seed=0, dtype=np.float32, empty=1):
    """The inputs of ``apply``, with memories that hold something and have ``empty`` slots left."""
    rng, c = np.random.default_rng(seed), model.config
    shapes = [(model.obs_dim,), (model.action_dim,), (1,), (c.d_s,), (c.d_w,), (c.d_p,)]
    inputs = [rng.standard_normal((batch, *shape)).astype(dtype) for shape in shapes]
    inputs[2] = np.ones_like(inputs[2])
    memories = [rng.standard_normal((batch, n, d)).astype(dtype) for n, d in zip(c.cms_sizes, c.cms_dims)]
    keys = [rng.standard_normal((batch, n, c.d_k)).astype(dtype) for n in c.cms_sizes]
    for key in keys:
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        key[:, key.shape[1] - empty :] = 0
    return (*inputs, memories, keys)


@pytest.mark.parametrize("config, sizes, expected", [
    (CoreModelConfig.seed(), (64, 7, 7), 172_202),
    (CoreModelConfig.seed(use_object_slot=False), (64, 7, 7), 164_010),
    (CoreModelConfig.seed(cms_dims=(128, 256, 512)), (64, 7, 7), 215_210),
    (CoreModelConfig.pi5_optimized(), (128, 32, 32), 644_099),
    (CoreModelConfig(), (768, 128, 128), 3_408_521),
])
def test_published_sizes(config, sizes, expected):
    model, variables = make_core_model(0, *sizes, config)
    assert model.param_count(variables) == expected


def test_the_example_of_the_seed():
    config = CoreModelConfig.seed()
    model, variables = make_core_model(rng_key=42, obs_dim=64, action_dim=7, output_dim=7, config=config)
    cms_memories = [np.zeros((2, sz, dim)) for sz, dim in zip(config.cms_sizes, config.cms_dims)]
    cms_keys = [np.zeros((2, sz, config.d_k)) for sz in config.cms_sizes]
    y, info = model.apply(
        variables, np.zeros((2, 64)), np.zeros((2, 7)), np.zeros((2, 1)), np.zeros((2, 64)), np.zeros((2, 64)),
        np.zeros((2, 32)), cms_memories, cms_keys)
    assert y.shape == (2, 7) and y.dtype == np.float32
    assert info["fast_state"].shape == (2, 64) and info["wave_state"].shape == (2, 64)
    assert info["particle_state"].shape == (2, 32) and info["query"].shape == (2, 32)
    assert [m.shape for m in info["cms_memories"]] == [(2, 64, 32), (2, 128, 64), (2, 256, 128)]
    assert [a.shape for a in info["attention_weights"]] == [(2, 64), (2, 128), (2, 256)]
    assert list(info) == ["query", "context", "attention_weights", "fast_state", "wave_state", "particle_state",
                          "cms_memories", "cms_keys"]


FORMS = {
    "gated": {}, "tied": {"cms_write": "tied"}, "seed": {"core": "seed", "output_type": "discrete"},
    "euler": {"wave_mode": "euler", "saturation": "hard"}, "null slot": {"cms_null_slot": True, "particle_input": True},
    "no write": {"cms_write": "none", "use_layer_norm": False},
    "heads": {"value_head": True, "world_model_head": True},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_two_steps_of_the_whole_core(form):
    """Through parameters, inputs and states, with a write between the two reads."""
    soft = {"cms_write_threshold": 0.0, "cms_salience_temperature": 1.0}  # below a threshold it is straight-through
    model, variables = built(SMALL.replace(**soft, **FORMS[form]), dtype=np.float64)
    flat = flatten(variables["params"])
    inputs = example(model, 2, dtype=np.float64, empty=0)
    rng = np.random.default_rng(3)
    tree = {name: rng.standard_normal(leaf.shape) * 0.4 for name, leaf in flat.items()}
    count, levels = len(tree), len(inputs[6])

    def two_steps(*given):
        params = unflatten(dict(zip(tree, given[:count])))
        obs, action, reward, s, w, p = given[count : count + 6]
        memories, keys = list(given[count + 6 : count + 6 + levels]), list(given[count + 6 + levels :])
        outputs = []
        for _ in range(2):
            y, info = model.apply({"params": params}, obs, action, reward, s, w, p, memories, keys)
            s, w, p = info["fast_state"], info["wave_state"], info["particle_state"]
            memories, keys = info["cms_memories"], info["cms_keys"]
            outputs += [y, *info.get("world_model", {}).values()] + ([info["value"]] if "value" in info else [])
        return (*outputs, s, w, p, *memories)

    assert xc.gradcheck(two_steps, [*tree.values(), *inputs[:6], *inputs[6], *inputs[7]], rtol=2e-5, directions=1)


@pytest.mark.parametrize("form", ["gated", "tied", "seed", "heads"])
def test_unbatched_equals_batched(form):
    model, variables = built(SMALL.replace(**FORMS[form]))
    variables = inference_variables(variables)
    inputs = example(model, 3)
    y, info = model.apply(variables, *inputs)
    for row in range(3):
        one = [[x[row] for x in part] if isinstance(part, list) else part[row] for part in inputs]
        single, seen = model.forward_single(variables, *one)
        np.testing.assert_allclose(single, y[row], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(seen["context"], info["context"][row], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(seen["cms_keys"][1], info["cms_keys"][1][row], rtol=2e-5, atol=2e-6)
    with pytest.raises(BatchDimensionError, match="without a batch"):
        model.forward_single(variables, *inputs)


def test_a_sequence_is_its_steps_and_any_division_of_them():
    model, variables = built()
    variables = inference_variables(variables)
    rng = np.random.default_rng(1)
    obs, actions = rng.standard_normal((2, 7, 5)), rng.standard_normal((2, 7, 2))
    rewards = np.ones((2, 7, 1))
    whole, last = model.sequence(variables, obs, actions, rewards)
    first, state = model.sequence(variables, obs[:, :3], actions[:, :3], rewards[:, :3])
    second, state = model.sequence(variables, obs[:, 3:], actions[:, 3:], rewards[:, 3:], state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state.memories[0], last.memories[0], rtol=1e-6)


def test_a_reset_forgets_the_episode_before():
    model, variables = built()
    variables = inference_variables(variables)
    rng = np.random.default_rng(1)
    obs, actions, rewards = rng.standard_normal((2, 6, 5)), rng.standard_normal((2, 6, 2)), np.ones((2, 6, 1))
    resets = np.zeros((2, 6), bool)
    resets[0, 3] = True
    y, _ = model.sequence(variables, obs, actions, rewards, resets=resets)
    fresh, _ = model.sequence(variables, obs[:1, 3:], actions[:1, 3:], rewards[:1, 3:])
    on, _ = model.sequence(variables, obs, actions, rewards)
    np.testing.assert_allclose(y[:1, 3:], fresh, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[1], on[1], rtol=1e-6)
    assert np.abs(y[0, 3:] - on[0, 3:]).max() > 1e-4


def test_recorded_and_plain_steps_agree_and_stay_float32():
    model, variables = built()
    inputs = example(model, 2)
    recorded, _ = model.apply(variables, *inputs)
    plain, info = model.apply(inference_variables(variables), *inputs)
    assert isinstance(plain, np.ndarray) and plain.dtype == np.float32 == info["wave_state"].dtype
    np.testing.assert_allclose(recorded.data, plain, rtol=1e-5, atol=1e-6)


def test_states_stay_within_the_limit():
    model, variables = built(SMALL.replace(state_saturation_limit=2.0))
    obs = np.full((1, 50, 5), 1e6)
    _, state = model.sequence(inference_variables(variables), obs, np.ones((1, 50, 2)) * 1e6, np.ones((1, 50, 1)))
    assert max(np.abs(x).max() for x in state[:3]) <= 2.0


def test_images_objects_and_heads():
    config = SMALL.replace(obs_type="image", value_head=True, world_model_head=True)
    model, _ = make_core_model(0, 5, 2, 3, config)
    variables = {"params": model.init(0, object_features=True)}
    state, rng = model.initial_state(2), np.random.default_rng(0)
    inputs = (rng.random((2, 12, 10, 3)), np.zeros((2, 2)), np.zeros((2, 1)), *state[:5])
    y, info = model.apply(variables, *inputs, object_features=rng.random((2, 4, 32)))
    other, _ = model.apply(variables, *inputs)
    assert y.shape == (2, 3) and info["value"].shape == (2, 1)
    assert info["world_model"]["next_observation"].shape == (2, 5)
    assert np.abs(y.data - other.data).max() > 1e-4
    loss = world_model_loss(tuple(info["world_model"].values()), np.ones((2, 5)), np.ones((2, 1)), np.zeros((2, 1)))
    assert loss.data > 0
    ops.sum(y).backward()
    assert np.abs(variables["params"]["encoder"]["conv0"]["kernel"].grad).max() > 0


def test_loss_and_grad_has_the_form_of_the_parameters():
    model, variables = built()
    loss, slopes = model.loss_and_grad(variables["params"], (example(model, 2), np.zeros((2, 3))))
    assert loss > 0
    assert {k: v.shape for k, v in flatten(slopes).items()} == {
        k: v.shape for k, v in flatten(arrays(variables["params"])).items()}


@pytest.mark.parametrize("change, error, message", [
    ({0: np.zeros((2, 9))}, ShapeError, "x_obs"), ({1: np.zeros((2, 9))}, ShapeError, "a_prev"),
    ({1: np.zeros((3, 2))}, BatchDimensionError, "different batches"),
    ({3: np.zeros((2, 9))}, ShapeError, "s_prev"), ({2: np.zeros((2, 2))}, BatchDimensionError, "reward"),
    ({6: [np.zeros((2, 3, 5))]}, ShapeError, "cms_memories"), ({3: np.zeros(6)}, BatchDimensionError, "batch axis"),
    ({0: np.zeros((2, 2, 5))}, BatchDimensionError, "axes"),
])  # fmt: skip
def test_wrong_inputs_are_named(change, error, message):
    model, variables = built()
    inputs = list(example(model, 2))
    for place, value in change.items():
        inputs[place] = value
    with pytest.raises(error, match=message):
        model.apply(variables, *inputs)
    with pytest.raises(ConfigError, match="audio"):
        model.apply(variables, *example(model, 2), audio_features=np.zeros(3))


def test_presets_and_validation():
    assert CoreModelConfig.cloud_optimized() == CoreModelConfig.tpu_optimized()
    assert hash(CoreModelConfig(cms_sizes=[1, 2, 3])) == hash(CoreModelConfig(cms_sizes=(1, 2, 3)))
    for name in ("seed", "pi5", "seed_local_2050", "columnar_small", "wave_only", "hybrid", "v6.0"):
        config = CoreModelConfig.preset(name)
        assert CoreModelConfig.from_dict(config.to_dict()) == config
        lives = config.half_lives
        assert list(lives) == sorted(lives)
    assert np.allclose(CoreModelConfig.seed().half_lives, (6.58, 13.51, 68.97), atol=0.01)
    for wrong in ({"cms_decays": (0.9, 0.99, 0.999)}, {"cms_decays": (0.1, 0.05)}, {"cms_decays": (1.0, 0.5, 0.1)},
                  {"d_s": 0}, {"core": "sead"}, {"mamba_state_dim": 3}, {"cms_write": "tied", "d_c": 8},
                  {"gradient_clip": 0.0}):
        with pytest.raises(ConfigError):
            CoreModelConfig(**wrong)
    with pytest.raises(XuraError, match="nano"):
        CoreModelConfig.preset("nano")
