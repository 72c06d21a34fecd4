"""The laws of the predictor: it reads twice; padding, the order of the batch, and splits do not matter."""

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba.mamba3 import Mamba3State
from xuravljepa import angn
from xuravljepa.predictor import Predictor, PredictorConfig, WordEmbedding
from xuravljepa.tokenizer import PAD, WORD_BYTES, ByteTokenizer

CONFIG = PredictorConfig(d_model=16, n_layers=2, d_state=8, headdim=8, vision_dim=6, query_dim=12,
                         embed_dim=10, n_visual=5, n_read=2)
QUESTIONS = ["is there a red square?", "how many circles?", "what shape is the large green one?"]


def words(texts, extra=0):
    """Texts → (B, W, P), with ``extra`` words of padding."""
    rows = [ByteTokenizer().words(text) for text in texts]
    ids = np.full((len(rows), max(map(len, rows)) + extra, WORD_BYTES), PAD, np.int64)
    for row, page in zip(rows, ids):
        page[: len(row)] = row
    return ids


def predictor(seed=0, gates=True, **changes):
    """With gates that are no longer the identity, unless switched off."""
    model = Predictor(CONFIG.replace(gates=gates, **changes), rng=np.random.default_rng(seed))
    if gates:
        rng = np.random.default_rng(9)
        for layer in model.layers:
            for parameter in layer.gate.parameters():
                parameter.data[...] = rng.standard_normal(parameter.shape) * 0.5
    return model


def pictures(count=3, seed=1, n=5):
    return np.random.default_rng(seed).standard_normal((count, n, 6)).astype(np.float32)


def same(one, other, tolerance=2e-5):
    """Two readings are equal: embedding, pooled features and every state."""
    np.testing.assert_allclose(one.embedding.data, other.embedding.data, atol=tolerance)
    np.testing.assert_allclose(one.pooled.data, other.pooled.data, atol=tolerance)
    for a, b in zip(one.states, other.states, strict=True):
        for part, twin in zip(a, b):
            np.testing.assert_allclose(part.data, twin.data, atol=5 * tolerance)


KINDS = [{}, {"bidirectional": True}, {"pool": "mean"}, {"bidirectional": True, "pool": "mean"}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


# ---------------------------------------------------------------------- splits
@every_kind
@pytest.mark.parametrize("seen", [True, False])
def test_look_then_read_is_forward(seen, kind):
    model, query, visual = predictor(**kind), words(QUESTIONS), pictures() if seen else None
    same(model.read(query, model.look(query, visual)), model(query, visual))


@every_kind
def test_look_then_hear_then_read_is_forward_with_a_tool(kind):
    model, query, visual = predictor(**kind), words(QUESTIONS), pictures()
    tool = words(["17", "the price is 3", "no"])
    told = model.read(query, model.hear(tool, model.look(query, visual)))
    same(told, model(query, visual, tool))
    assert abs(told.embedding.data - model(query, visual).embedding.data).max() > 1e-3


def test_reading_goes_on_from_any_states():
    """The state is all that is remembered: copies of it serve as well."""
    model, query = predictor(), words(QUESTIONS)
    states = model.look(query, pictures())
    copies = [Mamba3State(*(xc.Tensor(part.data.copy()) for part in state)) for state in states]
    same(model.read(query, states), model.read(query, copies), 0)


# ---------------------------------------------------------------------- what does not matter
@every_kind
@pytest.mark.parametrize("extra", [1, 7])
def test_padding_never_changes_anything(extra, kind):
    model, visual = predictor(**kind), pictures()
    plain = model(words(QUESTIONS), visual, words(["17", "3", "no"]))
    gates = model.gate_activation()
    padded = model(words(QUESTIONS, extra), visual, words(["17", "3", "no"], extra))
    if kind.get("bidirectional"):  # whose states are the tokens, padding and all
        plain, padded = plain._replace(states=[]), padded._replace(states=[])
    same(plain, padded)
    np.testing.assert_allclose(gates, model.gate_activation(), atol=1e-5)


@every_kind
def test_a_question_alone_and_among_longer_ones(kind):
    model, visual = predictor(**kind), pictures()
    together = model(words(QUESTIONS), visual)
    for i, question in enumerate(QUESTIONS):
        alone = model(words([question]), visual[i : i + 1])
        np.testing.assert_allclose(alone.embedding.data[0], together.embedding.data[i], atol=2e-5)
        np.testing.assert_allclose(alone.pooled.data[0], together.pooled.data[i], atol=2e-5)


def test_a_row_of_padding_is_no_tool():
    model, query, visual = predictor(), words(QUESTIONS), pictures()
    tool = words(["17", "3", "no"])
    told = model(query, visual, tool).embedding.data
    tool[1] = PAD
    mixed = model(query, visual, tool).embedding.data
    np.testing.assert_allclose(mixed[1], model(query, visual).embedding.data[1], atol=2e-5)
    np.testing.assert_allclose(mixed[[0, 2]], told[[0, 2]], atol=2e-5)


def test_the_order_of_the_batch_does_not_matter():
    model, query, visual, order = predictor(), words(QUESTIONS), pictures(), [2, 0, 1]
    straight, turned = model(query, visual), model(query[order], visual[order])
    np.testing.assert_allclose(turned.embedding.data, straight.embedding.data[order], atol=2e-5)
    np.testing.assert_allclose(model.gate_activation()[:, [1, 2, 0]],
                               [layer.gate.activation[[1, 2, 0]] for layer in model.layers])


# ---------------------------------------------------------------------- what does matter
@every_kind
def test_what_is_read_depends_on_question_and_picture(kind):
    model, query, visual = predictor(**kind), words(QUESTIONS[:1]), pictures(1)
    base = model(query, visual).embedding.data
    for other in (
        model(words(["is there a red circle?"]), visual),
        model(words(["is red there a square?"]), visual),
        model(query, pictures(1, seed=2)),
        model(query, visual[:, [0, 2, 1, 3, 4]]),
        model(query),
    ):
        assert abs(other.embedding.data - base).max() > 1e-4


@every_kind
def test_the_second_question_decides_what_is_read(kind):
    """Seen with one question in mind, asked another."""
    model, visual = predictor(**kind), pictures(1)
    states = model.look(words(QUESTIONS[:1]), visual)
    answers = [model.read(words([question]), states).embedding.data for question in QUESTIONS]
    assert abs(answers[0] - answers[1]).max() > 1e-4 and abs(answers[1] - answers[2]).max() > 1e-4


@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_comes_later_is_seen_in_both_directions_or_in_one(bidirectional):
    model, visual = predictor(bidirectional=bidirectional), pictures(1)

    def seen(question):
        first, last = model._query(words(QUESTIONS[:1])), model._query(words([question]))
        h, _ = model.run([first, model._visual(visual), last])
        return h.data[:, first.h.shape[1] : first.h.shape[1] + visual.shape[1]]

    difference = abs(seen("how many?") - seen("which colour?")).max()
    assert (difference > 1e-4) == bidirectional


def test_the_mean_is_over_the_question_and_what_reads():
    model, query, visual = predictor(pool="mean"), words(QUESTIONS, extra=3), pictures()
    h, _ = model.run([question := model._query(query), model._visual(visual), question, read := model._read(question)])
    normal = model.final_norm(h).data
    for row, mask in enumerate(question.mask):
        tokens = normal[row, -len(mask) - read.h.shape[1] :][np.concatenate([mask, read.mask[row]])]
        np.testing.assert_allclose(model(query, visual).pooled.data[row], tokens.mean(axis=0), atol=1e-5)


def test_gradients_reach_both_mixers_through_several_readings():
    model, query = predictor(bidirectional=True), words(QUESTIONS[:1])
    states = model(query, pictures(1)).states
    model.read(words(QUESTIONS[1:2]), states).embedding.sum().backward()
    for mixer in (model.layers[0].mixer.forward_mixer, model.layers[0].mixer.backward_mixer):
        assert mixer.in_proj.weight.grad.any()
    assert model.vision_proj.weight.grad.any()


def test_embeddings_have_unit_length():
    for model in (predictor(), predictor(seed=4, gates=False)):
        lengths = np.linalg.norm(model(words(QUESTIONS), pictures()).embedding.data, axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_gradients_flow_into_the_states_that_are_read():
    model = predictor(n_layers=1, d_model=8, d_state=4, headdim=8).to_dtype(np.float64)
    query = words(["how many?"])
    with xc.no_grad():
        state = model.look(query, pictures(1).astype(np.float64))[0]

    def read(h):
        return model.read(query, [state._replace(h=h)]).embedding

    assert xc.gradcheck(read, [state.h.data])


# ---------------------------------------------------------------------- which patches are read
def test_the_least_usual_patches_are_read_in_their_places():
    """Patches 2 and 4 stand out; what the others hold does not matter as long as they stay usual."""
    model, query = predictor(n_salient=2), words(QUESTIONS[:1])
    visual = pictures(1) * 0.1
    visual[:, [2, 4]] += 3
    seen = model(query, visual).embedding.data
    usual, salient, exchanged = visual.copy(), visual.copy(), visual.copy()
    usual[:, [1, 3]] *= -1
    salient[:, 4] *= 1.1
    exchanged[:, [2, 3]] = visual[:, [3, 2]]
    np.testing.assert_allclose(model(query, usual).embedding.data, seen, atol=2e-5)
    assert abs(model(query, salient).embedding.data - seen).max() > 1e-4
    assert abs(model(query, exchanged).embedding.data - seen).max() > 1e-4  # its place is part of it
    together = model(words(QUESTIONS[:1] * 2), np.concatenate([visual, exchanged])).embedding.data
    np.testing.assert_allclose(together[:1], seen, atol=2e-5)


def test_whitened_tokens_have_mean_zero_and_unit_spread_in_every_direction():
    rng = np.random.default_rng(0)
    visual = (rng.standard_normal((400, 5, 6)) @ rng.standard_normal((6, 6)) * 5 + 7).astype(np.float32)
    model = predictor()
    model.fit_vision(visual, floor=0.0)
    white = ((visual - model.vision_mean) @ model.vision_whiten).reshape(-1, 6)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=1e-2)
    model.fit_vision(visual)  # with the floor, weak directions stay weaker
    white = ((visual - model.vision_mean) @ model.vision_whiten).reshape(-1, 6)
    spread = np.linalg.eigvalsh(np.cov(white.T))
    assert 0 < spread[0] < spread[-1] < 1
    constant = np.ones((3, 5, 6), np.float32)
    model.fit_vision(constant + rng.standard_normal((3, 5, 1)).astype(np.float32) * 1e-3)
    assert np.isfinite(model(words(QUESTIONS), constant).pooled.data).all()


# ---------------------------------------------------------------------- gates
def test_new_gates_are_exactly_open():
    gated = Predictor(CONFIG, rng=np.random.default_rng(0))
    plain = Predictor(CONFIG.replace(gates=False), rng=np.random.default_rng(1))
    plain.load_state_dict({name: array for name, array in gated.state_dict().items() if ".gate." not in name})
    query, visual = words(QUESTIONS), pictures()
    assert gated(query, visual).embedding.data.tobytes() == plain(query, visual).embedding.data.tobytes()
    np.testing.assert_array_equal(gated.gate_activation(), np.full((2, 3), 0.5))
    assert plain.gate_activation() is None
    assert all(layer.gate.regulariser().item() == 0 for layer in gated.layers)


def test_gates_see_features_and_kinds_of_token():
    gate = angn.Gate(4)
    z = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    gate.bias.data[angn.TOOL] = 10
    gate.bias.data[angn.VISUAL] = -10
    opened = gate(z, np.array([angn.QUERY, angn.TOOL, angn.VISUAL])).data
    np.testing.assert_array_equal(opened[:, 0], z[:, 0])
    np.testing.assert_allclose(opened[:, 1], 2 * z[:, 1], rtol=1e-3)
    np.testing.assert_allclose(opened[:, 2], 0, atol=1e-3)
    np.testing.assert_allclose(gate.activation, 0.5, atol=1e-3)
    masked = np.array([[True, True, False], [False, False, True]])
    gate(z, np.array([angn.QUERY, angn.TOOL, angn.VISUAL]), masked)
    np.testing.assert_allclose(gate.activation, [0.75, 0], atol=1e-3)
    assert gate.regulariser().item() == pytest.approx(0.5, abs=1e-3)
    np.testing.assert_array_equal(angn.context_reset(np.array([[0.1, 0.5], [0.15, 0.5]])), [True, False])


def test_gradients_of_a_gate():
    rng = np.random.default_rng(0)
    gate = angn.Gate(3).to_dtype(np.float64)

    def gated(z, weight, bias):
        gate.__dict__.update(weight=weight, bias=bias)
        return gate(z, np.array([0, 3, 3]))

    assert xc.gradcheck(gated, [rng.standard_normal(shape) for shape in ((2, 3, 3), (3,), (4, 3))])


# ---------------------------------------------------------------------- words
def test_words_are_their_bytes_in_their_places():
    embed = WordEmbedding(264, WORD_BYTES, 16, rng=np.random.default_rng(0))
    red, der, redder, nothing = embed(words(["red der redder"])).data[0].tolist() + [None]
    assert np.abs(np.subtract(red, der)).max() > 0.1 and np.abs(np.subtract(red, redder)).max() > 0.1
    expected = sum(embed.byte.data[byte] * embed.place.data[place] for place, byte in enumerate(b"red"))
    np.testing.assert_allclose(red, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embed(np.full((1, 1, WORD_BYTES), PAD)).data, np.zeros((1, 1, 16)))


# ---------------------------------------------------------------------- refusals
def test_nonsense_is_refused():
    model, query = predictor(), words(QUESTIONS)
    with pytest.raises(ShapeError, match="1 states for 2 layers"):
        model.read(query, model.look(query, pictures())[:1])
    with pytest.raises(ShapeError, match="bias_layer is 2; there are 2 layers"):
        model.read(query, model.look(query, pictures()), xc.Tensor(np.zeros((3, 16), np.float32)), 2)
    for changes, message in (
        ({"n_read": 0}, "n_read is 0"),
        ({"n_salient": -1}, "n_salient is -1"),
        ({"headdim": 5}, "not a multiple of headdim 5"),
        ({"pool": "last"}, "pool is 'last'; expected one of read, mean"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"headdim": 0}, "headdim is 0"),
        ({"d_model": -4}, "d_model is -4"),
        ({"vocab_size": 256}, "vocab_size is 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            CONFIG.replace(**changes)


def test_the_residual_mode_adds_to_the_stream_after_its_layer():
    model, query = predictor(), words(QUESTIONS)
    states = model.look(query, pictures())
    nothing, something = (xc.Tensor(np.full((3, 16), value, np.float32)) for value in (0, 1))
    same(model.read(query, states, nothing, 0), model.read(query, states), 1e-6)
    late, early = (model.read(query, states, something, layer) for layer in (1, 0))
    for a, b in zip(late.states[0], model.read(query, states).states[0]):
        np.testing.assert_array_equal(a.data, b.data)
    assert abs(early.embedding.data - late.embedding.data).max() > 1e-4
