"""The fused step against the model, and the compiled kernel against its twin."""

import numpy as np
import pytest

from xuramamba.wavecore import CoreModelConfig, inference_variables, make_core_model
from xuramamba.wavecore.fused_step import fused_step, fused_step_numpy, pack, supports

FORMS = {
    "seed": {}, "network": {"cms_write": "network", "use_object_slot": False}, "no write": {"cms_write": "none"},
    "modes": {"mamba_state_dim": 4, "wave_mode": "euler", "saturation": "hard"},
    "null": {"cms_null_slot": True, "particle_input": True, "output_type": "discrete"},
}  # fmt: skip


def flat_state(state, dtype):
    levels = [np.concatenate([x[0].ravel() for x in part]).astype(dtype) for part in state[3:]]
    return [x[0].astype(dtype) for x in state[:3]] + levels


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-4), (np.float64, 1e-9)])
@pytest.mark.parametrize("form", FORMS)
def test_ten_steps_are_those_of_the_model(form, dtype, tolerance):
    config = CoreModelConfig.seed(**{"d_s": 24, "d_w": 16, "d_p": 8, "d_e": 16, "d_k": 8, "d_c": 16,
                                     "cms_sizes": (4, 5, 6), "cms_dims": (8, 12, 16), **FORMS[form]})
    model, variables = make_core_model(0, 9, 3, 3, config)
    variables = inference_variables(variables, dtype)
    state = model.initial_state(1, dtype)
    packed, rng = pack(model, variables["params"], dtype), np.random.default_rng(0)
    states = {kernel: flat_state(state, dtype) for kernel in (fused_step, fused_step_numpy)}
    for _ in range(10):
        obs, action = rng.standard_normal((1, 9)).astype(dtype), rng.standard_normal((1, 3)).astype(dtype)
        reward = rng.choice([0.0, 1.0], (1, 1)).astype(dtype)
        expected, state, _ = model.step(variables["params"], obs, action, reward, state)
        for kernel, own in states.items():
            y = np.empty(3, dtype)
            kernel(*packed, obs[0], action[0], reward[0], *own, y)
            np.testing.assert_allclose(y, expected[0], rtol=tolerance, atol=tolerance)
            for mine, theirs in zip(own, flat_state(state, dtype)):
                np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    assert state.usage[0].any() == (config.cms_write != "none")


def test_what_the_kernel_does_not_compute_it_does_not_claim():
    for config in (CoreModelConfig.seed(core="seed"), CoreModelConfig.seed(value_head=True),
                   CoreModelConfig.seed(use_layer_norm=False), CoreModelConfig.seed(obs_type="image")):
        assert not supports(make_core_model(0, 4, 2, 2, config)[0])
    assert supports(make_core_model(0, 4, 2, 2, CoreModelConfig())[0])
