"""The memory: what it reads, where it writes, how it forgets.  The wave: exact, and one scan."""

import numpy as np
import pytest

import xuracore as xc
from xuramamba.wavecore import CoreModelConfig, memory
from xuramamba.wavecore.memory import SlotRead, SlotWrite, choose_slot
from xuramamba.wavecore.parameters import arrays
from xuramamba.wavecore.wave import new_wave, wave_scan, wave_step

RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def filled(batch=2, slots=5, width=3, key=4, empty=1):
    keys = unit(RNG.standard_normal((batch, slots, key)))
    keys[:, slots - empty :] = 0
    return RNG.standard_normal((batch, slots, width)), keys


@pytest.mark.parametrize("null_slot", [False, True])
def test_read_is_attention_over_the_slots_in_use(null_slot):
    values, keys = filled()
    query = RNG.standard_normal((2, 4))
    context, attention = SlotRead.apply(query, keys, values, null_slot=null_slot)
    weights = np.exp(np.einsum("bnk,bk->bn", keys, query) / 2)
    weights[:, -1] = 0
    weights /= weights.sum(1, keepdims=True) + null_slot
    np.testing.assert_allclose(attention, weights, rtol=1e-12)
    np.testing.assert_allclose(context, np.einsum("bn,bnd->bd", weights, values), rtol=1e-12)
    assert xc.gradcheck(lambda *x: SlotRead.apply(*x, null_slot=null_slot),
                        [query, unit(RNG.standard_normal((2, 5, 4))), values])


def test_an_empty_memory_gives_nothing():
    context, attention = SlotRead.apply(np.ones((1, 4)), np.zeros((1, 5, 4)), np.ones((1, 5, 3)))
    assert not context.any() and not attention.any()


def test_write_changes_one_slot_and_fades_the_others():
    values, keys = filled()
    value, key, gate, slot = RNG.standard_normal((2, 3)), unit(RNG.standard_normal((2, 4))), [[0.7], [0.4]], [4, 1]
    gate, slot = np.array(gate), np.array(slot)
    after, new_keys = SlotWrite.apply(values, keys, value, key, gate, slot=slot, decay=0.1)
    rows = np.arange(2)
    expected = 0.9 * values
    expected[rows, slot] = (1 - gate) * expected[rows, slot] + gate * value
    np.testing.assert_allclose(after, expected, rtol=1e-12)
    np.testing.assert_allclose(new_keys[0, 4], key[0], rtol=1e-12)  # an empty slot takes the key as it is
    np.testing.assert_allclose(np.linalg.norm(new_keys[1], axis=-1), [1, 1, 1, 1, 0], rtol=1e-12)
    np.testing.assert_array_equal(new_keys[0, :4], keys[0, :4])  # keys do not fade
    assert xc.gradcheck(lambda *x: SlotWrite.apply(*x, slot=slot, decay=0.1), [values, keys, value, key, gate])


def test_a_gate_below_the_threshold_writes_nothing_but_has_a_gradient():
    values, keys = filled()
    given = [xc.tensor(x, requires_grad=True) for x in
             (values, keys, RNG.standard_normal((2, 3)), unit(RNG.standard_normal((2, 4))), np.full((2, 1), 0.05))]
    after, new_keys = SlotWrite.apply(*given, slot=np.array([0, 4]), decay=0.1, threshold=0.1)
    np.testing.assert_allclose(after.data, 0.9 * values)
    np.testing.assert_array_equal(new_keys.data, keys)
    after.sum().backward()
    assert np.abs(given[4].grad).min() > 0


def test_the_slot_is_the_nearest_or_the_least_used():
    keys = np.eye(3)[None].repeat(3, 0)
    keys[:, 2] = 0
    key = unit(np.array([[0.99, 0.1, 0], [1, 1, 0], [0, 0, 1.0]]))
    usage = np.array([[5, 1, 2], [5, 1, 2], [5, 4, 0.0]])
    assert choose_slot(keys, key, usage, 0.9).tolist() == [0, 1, 2]


@pytest.mark.parametrize("write", ["network", "tied"])
def test_writes_fill_different_slots_with_unit_keys(write):
    config = CoreModelConfig.development(cms_write=write)
    rng = np.random.default_rng(1)
    read, own = arrays(memory.new_read(rng, config)), arrays(memory.new_write(rng, config))
    memories, keys, usage = memory.empty_memory(config, 2)
    for _ in range(30):
        s, e, r = (rng.standard_normal((2, d)).astype(np.float32) for d in (64, 64, 1))
        r = np.ones_like(r)
        query, _, attentions = memory.cms_read(read, config, s, e, memories, keys)
        memories, keys, usage = memory.cms_write(own, read, config, s, e, r, query, memories, keys, usage, attentions)
    assert memory.in_use(keys[0]).sum() >= 20 and memory.in_use(keys[1]).sum() >= 20
    lengths = np.linalg.norm(keys[1], axis=-1)
    np.testing.assert_allclose(lengths[lengths > 0], 1, rtol=1e-5)
    assert memories[0].dtype == np.float32 == usage[0].dtype


def test_no_slot_outgrows_what_was_written():
    values, keys = np.zeros((1, 3, 4)), np.zeros((1, 3, 2))
    for slot in (0, 1, 2, 0, 0, 1) * 5:
        value, gate = unit(RNG.standard_normal((1, 4))), RNG.random((1, 1))
        values, keys = SlotWrite.apply(values, keys, value, unit(RNG.standard_normal((1, 2))), gate,
                                       slot=np.array([slot]), decay=0.05)
        assert np.linalg.norm(values, axis=-1).max() <= 1 + 1e-12


def test_half_life_is_that_of_the_writes():
    config = CoreModelConfig.seed()
    for decay, life in zip(config.cms_decays, config.half_lives):
        held = np.ones((1, 1, 1))
        for _ in range(round(life)):
            held, _ = SlotWrite.apply(held, np.ones((1, 1, 2)), np.ones((1, 1)), np.ones((1, 2)), np.zeros((1, 1)),
                                      slot=np.array([0]), decay=decay, threshold=0.1)
        assert abs(held.item() - 0.5) < 0.03


# ---------------------------------------------------------------------- wave
def wave(modes=2, mode="zoh"):
    config = CoreModelConfig.development().replace(d_w=8, mamba_state_dim=modes, wave_mode=mode)
    return config, arrays(new_wave(np.random.default_rng(2), config, 5), np.float64)


@pytest.mark.parametrize("modes", [1, 4])
@pytest.mark.parametrize("mode", ["zoh", "euler"])
def test_scan_is_its_steps(modes, mode):
    config, params = wave(modes, mode)
    x, start = RNG.standard_normal((2, 6, 5)), RNG.standard_normal((2, 8))
    together, last = wave_scan(params, config, start, x)
    carry = start
    for t in range(6):
        emitted, carry = wave_step(params, config, carry, x[:, t])
        np.testing.assert_allclose(together[:, t], emitted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(last, carry, rtol=1e-10)


def test_hold_is_exact_and_euler_is_not():
    """A constant input: two steps of Δ are one of 2Δ, as only the exact hold has it.  A = -1, Δ = 0.1: B̄ = 0.0951626."""
    for mode, entering in (("zoh", 0.0951626), ("euler", 0.1)):
        config = CoreModelConfig.development().replace(d_w=1, wave_mode=mode, mamba_dt_min=1e-9)
        params = {"in": {"kernel": np.ones((1, 1))}, "dt": {"kernel": np.zeros((1, 1)), "bias": np.log(np.expm1([0.1]))},
                  "b": {"kernel": np.ones((1, 1))}, "k": {"kernel": np.ones((1, 1))},
                  "gate": {"kernel": np.zeros((1, 1))}, "out": {"kernel": np.ones((1, 1))},
                  "a_raw": np.log(np.expm1([[1.0]])), "b_base": np.ones((1, 1)), "c_base": np.ones((1, 1)),
                  "d": np.zeros(1)}
        emitted, carry = wave_step(params, config, np.zeros((1, 1)), np.ones((1, 1)))
        np.testing.assert_allclose(carry, [[entering]], atol=5e-8)
        np.testing.assert_allclose(emitted, carry / 2)
        _, later = wave_step(params, config, np.ones((1, 1)), np.zeros((1, 1)))
        np.testing.assert_allclose(later, [[0.904837]], atol=5e-7)


def test_a_mode_without_decay_is_a_plain_sum():
    config, params = wave(1)
    params["a_raw"][:] = -1000  # softplus of it is 0
    _, carry = wave_step(params, config, np.zeros((1, 8)), RNG.standard_normal((1, 5)))
    assert np.isfinite(carry).all() and np.abs(carry).max() > 0


def test_a_starts_near_its_published_value():
    a = -np.log1p(np.exp(wave()[1]["a_raw"]))
    assert abs(a.mean() + 0.6931) < 0.03
