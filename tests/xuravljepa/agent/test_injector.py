"""The laws of writing into states: identity at the start, frames that turn, a limit, a real target."""

import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from training import optim
from xuracore import ops
from xuracore.errors import ConfigError, ShapeError
from xuramamba.mamba3 import Mamba3, Mamba3State
from xuramamba.rotary import half_order, rotate
from xuravljepa.agent.injector import (
    MODES, InjectorConfig, LayerWrite, StateInjector, injection_loss, relative, state_change, turn,
)
from xuravljepa.predictor import Predictor, PredictorConfig
from xuravljepa.tokenizer import PAD, WORD_BYTES, ByteTokenizer

PREDICTOR = PredictorConfig(d_model=8, n_layers=3, d_state=8, headdim=4, vision_dim=8, query_dim=8)
CONFIG = InjectorConfig(knowledge_dim=6, rank=2)
HEADS, WIDTH, SIZE, ANGLES = 4, 4, 8, 2


def states(batch=2, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return xc.Tensor(rng.standard_normal(shape).astype(dtype))

    return [
        Mamba3State(draw(batch, HEADS, ANGLES), draw(batch, HEADS, WIDTH, SIZE), draw(batch, 1, HEADS, SIZE),
                    draw(batch, HEADS, WIDTH))
        for _ in range(PREDICTOR.n_layers)
    ]


def knowledge(batch=2, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, 6)).astype(np.float32)


def trained(seed=2, **changes):
    """An injector whose parameters are anything but zero."""
    injector = StateInjector(CONFIG.replace(**changes), PREDICTOR)
    rng = np.random.default_rng(seed)
    for parameter in injector.parameters():
        parameter.data[...] = rng.standard_normal(parameter.shape)
    return injector


@pytest.mark.parametrize("mode", ["state", "offset"])
def test_narrowed_knowledge_is_a_write_of_low_rank(mode):
    narrow, whole = trained(mode=mode, width=3), StateInjector(CONFIG.replace(mode=mode), PREDICTOR)
    product = {name: value for name, value in narrow.state_dict().items() if name != "narrow"}
    for name, value in product.items():
        if name.endswith((".value", ".key", ".keep")):
            product[name] = value @ narrow.narrow.data
    whole.load_state_dict(product)
    one, other = (each.take_in(None, None, knowledge(), states()) for each in (narrow, whole))
    for a, b in zip(one.offsets or [s.h for s in one.states], other.offsets or [s.h for s in other.states]):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- the write
def test_a_new_injector_changes_nothing():
    before = states()
    after = StateInjector(CONFIG, PREDICTOR)(knowledge(), before)
    for one, other in zip(before, after):
        for part, same in zip(one, other):
            assert part.data.tobytes() == same.data.tobytes()
    np.testing.assert_array_equal(state_change(before, after), 0)
    residual = StateInjector(CONFIG.replace(mode="residual"), PREDICTOR)
    np.testing.assert_array_equal(residual.bias(knowledge()).data, np.zeros((2, 8)))


def test_a_new_injector_can_learn():
    """What starts at zero has gradients that do not."""
    injector = StateInjector(CONFIG, PREDICTOR)
    before = states()
    loss = injection_loss(before, injector(knowledge(), before), states(seed=5))
    loss.backward()
    for write in injector.writes:
        assert write.gain.grad.any() and write.keep.grad.any() and write.keep_bias.grad.any()


def test_the_write_is_the_formula():
    write = trained().writes[0]
    k, state = knowledge(), states()[0]
    found = write(k, state.h, state.theta).data
    values = (k @ write.value.data.T).reshape(2, 2, HEADS, WIDTH) * write.gain.data[..., None]
    keys = (k @ write.key.data.T + write.key_bias.data).reshape(2, 2, HEADS, SIZE)
    kept = 2 / (1 + np.exp(-(k @ write.keep.data.T + write.keep_bias.data)))
    for b, head in np.ndindex(2, HEADS):
        expected = kept[b, head] * state.h.data[b, head]
        for r in range(2):
            key = rotate(keys[b, r, head], state.theta.data[b, head], "pair")
            expected = expected + np.outer(values[b, r, head], key)
        np.testing.assert_allclose(found[b, head], expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_write():
    rng = np.random.default_rng(0)
    write = LayerWrite(CONFIG, 2, 3, 5, rng=rng).to_dtype(np.float64)
    for parameter in write.parameters():
        parameter.data[...] = rng.standard_normal(parameter.shape)
    inputs = [rng.standard_normal(shape) for shape in ((2, 6), (2, 2, 3, 5), (2, 2, 2))]
    assert xc.gradcheck(write, inputs)
    names = [name for name, _ in write.named_parameters()]

    def with_parameters(*parameters):
        for name, parameter in zip(names, parameters):
            write.__dict__[name] = parameter
        return write(*inputs)

    assert xc.gradcheck(with_parameters, [parameter.data for parameter in write.parameters()])


def test_a_written_key_is_found_by_its_query():
    """Written now, read by the next query: the score is k·q, whatever angle the state has turned by."""
    rng = np.random.default_rng(0)
    key, query, value = (rng.standard_normal(n) for n in (SIZE, SIZE, WIDTH))
    for theta in (np.zeros(ANGLES), np.array([1.0, 5.5])):
        state = np.outer(value, turn(key, theta))
        np.testing.assert_allclose(state @ rotate(query, theta), value * (key @ query), rtol=1e-10)


# ---------------------------------------------------------------------- turning
@pytest.mark.parametrize("size, angles", [(8, 4), (8, 2), (5, 2), (4, 0)])
def test_turning_back_undoes_turning(size, angles):
    rng = np.random.default_rng(0)
    h, theta = rng.standard_normal((2, 3, 4, size)), rng.uniform(0, 7, (2, 3, angles))
    spread = theta[:, :, None, :]
    np.testing.assert_allclose(relative(turn(h, spread), theta), h, atol=1e-12)
    np.testing.assert_allclose(turn(relative(h, theta), spread), h, atol=1e-12)
    np.testing.assert_array_equal(turn(h, spread)[..., 2 * angles :], h[..., 2 * angles :])
    np.testing.assert_allclose(np.linalg.norm(turn(h, spread), axis=-1), np.linalg.norm(h, axis=-1))


def test_turning_adds_angles_and_equals_the_mixer_s_rotation():
    rng = np.random.default_rng(0)
    x, a, b = rng.standard_normal((3, 8)), rng.uniform(0, 7, (3, 3)), rng.uniform(0, 7, (3, 3))
    np.testing.assert_allclose(turn(turn(x, a), b), turn(x, a + b), atol=1e-12)
    np.testing.assert_allclose(turn(x, a), rotate(x, a, "pair"), atol=1e-12)
    assert xc.gradcheck(turn, [x, a])
    with pytest.raises(ShapeError, match="5 angles need 10 coordinates; there are 8"):
        turn(x, np.zeros((3, 5)))


def test_turning_equals_published_rotary_embeddings():
    """Llama's rotation pairs the halves; the reordering of rotary.half_order leads there."""
    with np.load(Path(__file__).parents[2] / "golden" / "op_rope.npz", allow_pickle=False) as golden:
        meta, arrays = json.loads(str(golden["meta"])), {key: golden[key] for key in golden.files}
    width, base = meta["config"]["head_dim"], meta["config"]["base"]
    theta = arrays["in.pos"][:, None] * base ** -(np.arange(width // 2) / (width // 2))
    order = half_order(width)
    back = np.argsort(order)
    for name in ("q", "k"):
        x = xc.tensor(arrays[f"in.{name}"], requires_grad=True)
        y = turn(x[..., back], theta.astype(np.float32))[..., order]
        tolerance = 4 * meta["ref32_maxabs"][name]
        np.testing.assert_allclose(y.data, arrays[f"out.{name}"], rtol=0, atol=tolerance)
        y.backward(arrays[f"cot.{name}"])
        np.testing.assert_allclose(x.grad, arrays[f"gin.{name}"], rtol=1e-5, atol=2e-6)


# ---------------------------------------------------------------------- the limit
@pytest.mark.parametrize("limit", [0.01, 0.5, 4.0])
def test_no_state_changes_by_more_than_the_limit(limit):
    before = states()
    after = trained(max_change=limit)(knowledge() * 50, before)
    for one, other in zip(before, after):
        change = np.linalg.norm((other.h.data - one.h.data).reshape(2, -1), axis=1)
        size = np.linalg.norm(one.h.data.reshape(2, -1), axis=1)
        assert (change <= limit * size * (1 + 1e-5)).all()
    np.testing.assert_allclose(state_change(before, after), limit, rtol=1e-3)  # at the limit in every layer


def test_one_sample_s_limit_is_none_of_its_neighbour_s_business():
    injector, before, k = trained(max_change=1.0), states(), knowledge() * 0.01
    alone = injector(k, before)
    together = injector(k * np.array([[1], [1e4]], np.float32), before)
    for one, other in zip(alone, together):
        assert one.h.data[0].tobytes() == other.h.data[0].tobytes()
        assert (one.h.data[1] != other.h.data[1]).any()


def test_only_h_is_written():
    before = states()
    for one, other in zip(before, trained()(knowledge(), before)):
        assert other.theta is one.theta and other.k is one.k and other.v is one.v and other.h is not one.h


# ---------------------------------------------------------------------- the target
def test_the_taught_state_has_no_loss_and_the_old_one_a_loss_of_one():
    before, taught = states(), states(seed=7)
    assert injection_loss(before, taught, taught).item() == 0
    assert injection_loss(before, before, taught).item() == pytest.approx(1, rel=1e-5)


def test_the_loss_sees_states_in_their_own_frames():
    """A state and its angle turned by the same amount answer every later query alike: no loss."""
    before, taught = states(dtype=np.float64), states(seed=7, dtype=np.float64)
    shift = np.random.default_rng(3).uniform(0, 6, (2, HEADS, ANGLES))
    turned = [
        state._replace(theta=state.theta + shift, h=turn(state.h, shift[:, :, None, :])) for state in taught
    ]
    assert injection_loss(before, turned, taught).item() == pytest.approx(0, abs=1e-20)


def test_half_way_to_the_target_leaves_a_quarter_of_the_variance():
    before = states(dtype=np.float64)
    taught = [state._replace(h=state.h * 3.0) for state in before]
    halfway = [state._replace(h=state.h * 2.0) for state in before]
    assert injection_loss(before, halfway, taught).item() == pytest.approx(0.25)
    np.testing.assert_allclose(state_change(before, halfway), 1)


def test_gradients_reach_the_injected_states_alone():
    before, given, taught = states(), states(seed=5), states(seed=7)
    for state in (*before, *given, *taught):
        state.h.requires_grad_()
    injection_loss(before, given, taught).backward()
    assert all(state.h.grad is not None for state in given)
    assert all(state.h.grad is None for state in (*before, *taught))


def test_an_injector_learns_a_state_difference():
    """A few steps explain a third of what reading a token that depends on the knowledge changes."""
    rng = np.random.default_rng(0)
    mixer = Mamba3(8, d_state=SIZE, headdim=WIDTH, rng=rng)
    injector = StateInjector(CONFIG, PredictorConfig(**{**PREDICTOR.to_dict(), "n_layers": 1}))
    k = rng.standard_normal((16, 6)).astype(np.float32)
    x = rng.standard_normal((16, 4, 8)).astype(np.float32)
    told = (k @ rng.standard_normal((6, 8)).astype(np.float32))[:, None]
    with xc.no_grad():
        before = mixer(x)[1]
        taught = mixer(told, before)[1]
    optimizer, losses = optim.Adam(injector.parameters(), lr=0.03), []
    for _ in range(60):
        loss = injection_loss([before], injector(k, [before]), [taught])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(1, rel=1e-3) and losses[-1] < 0.7


# ---------------------------------------------------------------------- the modes
def small_predictor():
    return Predictor(PREDICTOR.replace(embed_dim=6, n_visual=5), rng=np.random.default_rng(0))


def seen(predictor, texts=("how many circles?", "is there a red square here?")):
    rows = [ByteTokenizer().words(text) for text in texts]
    query = np.full((len(rows), max(map(len, rows)), WORD_BYTES), PAD, np.int64)
    for row, page in zip(rows, query):
        page[: len(row)] = row
    visual = np.random.default_rng(1).standard_normal((len(rows), 5, 8)).astype(np.float32)
    return query, predictor.look(query, visual)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_takes_in_what_is_said(mode):
    """A sample's reading is its own, whatever the batch; the change is measured; gradients reach the injector."""
    predictor = small_predictor()
    query, before = seen(predictor)
    injector = StateInjector(CONFIG.replace(mode=mode), PREDICTOR)
    rng = np.random.default_rng(2)
    for parameter in injector.parameters():
        parameter.data[...] = rng.standard_normal(parameter.shape)
    k, words = knowledge(), query[:, :1]
    injection = injector.take_in(predictor, lambda: words, k, before)
    reading = injection.read(predictor, query)
    assert (injection.change > 0).all() and injection.change.shape == (2,)
    assert np.abs(reading.embedding.data - predictor.read(query, before).embedding.data).max() > 1e-3
    for i in range(2):
        own = [type(state)(*(part[i : i + 1] for part in state)) for state in before]
        length = int((query[i, :, 0] != PAD).sum())
        alone = injector.take_in(predictor, lambda i=i: words[i : i + 1], k[i : i + 1], own)
        found = alone.read(predictor, query[i : i + 1, :length])
        np.testing.assert_allclose(found.embedding.data[0], reading.embedding.data[i], atol=1e-5)
        np.testing.assert_allclose(alone.change, injection.change[i : i + 1], rtol=1e-5)
    (reading.embedding * reading.embedding.data[::-1]).sum().backward()
    assert all(np.any(parameter.grad) for parameter in injector.parameters())
    assert (mode == "text") == (not list(injector.parameters()))


@pytest.mark.parametrize("mode", ["offset", "residual"])
def test_a_new_injector_of_these_modes_changes_nothing(mode):
    predictor = small_predictor()
    query, before = seen(predictor)
    injection = StateInjector(CONFIG.replace(mode=mode), PREDICTOR).take_in(predictor, None, knowledge(), before)
    np.testing.assert_array_equal(injection.change, 0)
    np.testing.assert_array_equal(injection.read(predictor, query).embedding.data,
                                  predictor.read(query, before).embedding.data)


def test_an_offset_is_read_by_every_token():
    """y_t = C_t (h_t + h'): what it adds is C_t h' before gate and projection, whatever the state and the time."""
    rng = np.random.default_rng(0)
    mixer = Mamba3(8, d_state=8, headdim=4, rng=rng)
    x = xc.Tensor(rng.standard_normal((2, 5, 8)).astype(np.float32))
    offset = xc.Tensor(rng.standard_normal((2, 4, 4, 8)).astype(np.float32))
    z, _, _, c, *_ = np.split(x.data @ mixer.in_proj.weight.data.T, np.cumsum(mixer._row_counts())[:-1], axis=-1)
    c = c / np.sqrt(np.square(c).mean(axis=-1, keepdims=True) + 1e-5)  # a fresh C_norm has weights of one
    c = c[:, :, None] + mixer.C_bias.data[:, 0]
    added = np.einsum("blhn,bhpn->blhp", c, offset.data).reshape(2, 5, 16) * (z / (1 + np.exp(-z)))
    plain, state = mixer(x)
    given, after = mixer(x, offset=offset)
    np.testing.assert_allclose((given - plain).data, added @ mixer.out_proj.weight.data.T, atol=2e-5)
    for part, same in zip(after, state):
        np.testing.assert_array_equal(part.data, same.data)
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], bool)
    masked = mixer(x, mask=mask, offset=offset)[0].data
    np.testing.assert_allclose(masked[0], given.data[0], atol=2e-5)
    np.testing.assert_allclose(masked[1, 1:4], mixer(x[1:, 1:4], offset=offset[1:])[0].data[0], atol=2e-5)


# ---------------------------------------------------------------------- refusals
def test_nonsense_is_refused():
    for changes, message in (
        ({"mode": "telepathy"}, "choose one of state, offset, residual, token, text"),
        ({"rank": 0}, "rank is 0"),
        ({"max_change": 0.0}, "max_change is 0.0"),
        ({"residual_layer": -1}, "residual_layer is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            CONFIG.replace(**changes)
    with pytest.raises(ConfigError, match="residual_layer is 3; the predictor has 3 layers"):
        StateInjector(CONFIG.replace(mode="residual", residual_layer=3), PREDICTOR)
    with pytest.raises(ConfigError, match="writes into no state"):
        StateInjector(CONFIG.replace(mode="residual"), PREDICTOR)(knowledge(), states())
    with pytest.raises(ConfigError, match="has no bias"):
        StateInjector(CONFIG, PREDICTOR).bias(knowledge())
    with pytest.raises(ShapeError, match="2 states for 3 layers"):
        StateInjector(CONFIG, PREDICTOR)(knowledge(), states()[:2])
    with pytest.raises(ShapeError, match="linear"):
        StateInjector(CONFIG, PREDICTOR)(np.ones((2, 5), np.float32), states())


def test_float32_stays_float32():
    injector = trained()
    after = injector(knowledge(), states())
    assert {state.h.dtype for state in after} == {np.dtype(np.float32)}
    assert ops.REGISTRY["einsum"].weak
