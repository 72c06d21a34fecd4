"""The laws of modules: names, ties, states, switches; and of configurations."""

from dataclasses import dataclass, field

import numpy as np
import pytest

import xuracore as xc
from xuracore import nn
from xuracore.config import Config
from xuracore.errors import ConfigError, DTypeError, XuraError
from xuracore.nn.module import StateDictError


class Block(nn.Module):
    def __init__(self, width, rng):
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width, bias=False, rng=rng)

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Model(nn.Module):
    """Tied: ``head.weight`` is ``embedding.weight``."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.embedding = nn.Embedding(5, 4, rng=rng)
        self.blocks = nn.ModuleList(Block(4, rng) for _ in range(2))
        self.head = nn.Linear(4, 5, rng=rng)
        self.head.weight = self.embedding.weight
        self.register_buffer("mean", [0.5, 1.5])
        self._cache = nn.Linear(2, 2, rng=rng)
        self._hidden = nn.Parameter([1.0])

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


NAMES = [
    "embedding.weight",
    "blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.inner.weight",
    "blocks.1.norm.weight", "blocks.1.norm.bias", "blocks.1.inner.weight",
    "head.bias",
]


# ---------------------------------------------------------------------- names
def test_names_are_paths_in_order_of_assignment():
    model = Model()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [name for name, _ in model.named_buffers()] == ["mean"]
    assert list(model.state_dict()) == [*NAMES, "mean"]
    assert [path for path, _ in model.named_modules()][:4] == ["", "embedding", "blocks", "blocks.0"]


def test_tied_parameters_count_once_and_get_one_gradient():
    model = Model()
    assert model.parameter_count() == 5 * 4 + 2 * (4 + 4 + 16) + 5
    model(np.array([[0, 1, 1]])).sum().backward()
    both = model.embedding.weight.grad
    assert model.head.weight.grad is both

    untied = Model()
    untied.head.weight = nn.Parameter(untied.embedding.weight.data.copy())
    untied(np.array([[0, 1, 1]])).sum().backward()
    np.testing.assert_allclose(both, untied.embedding.weight.grad + untied.head.weight.grad, rtol=1e-6)


def test_a_list_of_modules_is_refused_before_it_is_forgotten():
    module = nn.Module()
    layer = nn.Linear(1, 1, rng=np.random.default_rng(0))
    for lost in ([layer], (1, layer), {"a": nn.Parameter([1.0])}):
        with pytest.raises(DTypeError, match="use ModuleList"):
            module.layers = lost
    module._layers = [layer]
    module.sizes = [1, 2]
    assert list(module.parameters()) == []


def test_module_list():
    rng = np.random.default_rng(0)
    layers = [nn.Linear(1, 1, rng=rng) for _ in range(3)]
    module = nn.ModuleList(layers[:2])
    module.append(layers[2])
    assert len(module) == 3 and list(module) == layers
    assert module[0] is layers[0] and module[-1] is layers[2] and module[1:] == layers[1:]
    with pytest.raises(IndexError):
        module[3]
    with pytest.raises(DTypeError, match="holds modules; got int"):
        module.append(3)


def test_a_parameter_is_contiguous_and_writable():
    frozen = np.arange(6, dtype=np.float32).reshape(2, 3)
    frozen.flags.writeable = False
    for given in (frozen, frozen.T, np.float32(2), [1.0, 2.0]):
        data = nn.Parameter(given).data
        assert data.flags.c_contiguous and data.flags.writeable and data.dtype == np.float32
        assert data.shape == np.shape(given)
    with pytest.raises(DTypeError, match="float32 or float64"):
        nn.Parameter([1, 2])


# ---------------------------------------------------------------------- states
def test_a_state_gives_the_same_model_back():
    model, other = Model(), Model(seed=1)
    assert other.load_state_dict(model.state_dict()) == ([], [])
    ids = np.array([[0, 3, 4]])
    np.testing.assert_array_equal(model(ids).data, other(ids).data)
    assert other.head.weight is other.embedding.weight
    assert other.embedding.weight.data is not model.embedding.weight.data


def test_loading_reports_everything_at_once_and_changes_nothing():
    model = Model()
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    del state["head.bias"], state["blocks.1.norm.bias"]
    state |= {"blocks.1.norm.bais": np.zeros(4), "foreign": np.zeros(1), "mean": np.zeros(3)}
    state["blocks.0.inner.weight"] = np.zeros((4, 5))
    with pytest.raises(StateDictError) as caught:
        model.load_state_dict(state)
    message = str(caught.value)
    for part in (
        "does not fit Model", "unexpected (2): blocks.1.norm.bais, foreign",
        "missing (2): blocks.1.norm.bias, head.bias", "wrong shape (2)",
        "blocks.0.inner.weight: file (4, 5), model (4, 4)", "mean: file (3,), model (2,)",
        "perhaps 'blocks.1.norm.bais' is meant to be 'blocks.1.norm.bias'",
    ):
        assert part in message
    assert isinstance(caught.value, XuraError) and isinstance(caught.value, KeyError)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_loading_loosely_takes_what_fits_and_says_what_did_not():
    model = Model()
    missing, unexpected = model.load_state_dict({"head.bias": np.full(5, 7), "foreign": 1}, strict=False)
    assert missing == [*NAMES[:-1], "mean"] and unexpected == ["foreign"]
    assert (model.head.bias.data == 7).all() and model.head.bias.dtype == np.float32
    with pytest.raises(StateDictError, match="wrong shape"):
        model.load_state_dict({"head.bias": np.zeros(4)}, strict=False)


def test_a_tied_parameter_may_come_under_either_name():
    model = Model()
    state = {name: array.copy() for name, array in model.state_dict().items()}
    table = state.pop("embedding.weight") + 1
    model.load_state_dict({**state, "head.weight": table})
    np.testing.assert_array_equal(model.embedding.weight.data, table)
    model.load_state_dict({**state, "head.weight": table, "embedding.weight": table + 1})
    np.testing.assert_array_equal(model.embedding.weight.data, table + 1)
    with pytest.raises(StateDictError, match=r"head.weight: file \(1,\), model \(5, 4\)"):
        model.load_state_dict({**state, "head.weight": np.zeros(1)})


def test_a_buffer_is_a_copy_and_loads_in_place():
    given = np.zeros(2, np.float32)
    module = nn.Module()
    module.register_buffer("table", given)
    given += 1
    assert not module.table.any() and not any(module.parameters())
    module.load_state_dict({"table": np.array([3, 4])})
    np.testing.assert_array_equal(module.table, [3, 4])


# ---------------------------------------------------------------------- switches
def test_freezing():
    model = Model()
    assert model.blocks.requires_grad_(False) is model.blocks
    assert model.parameter_count(trainable_only=True) == 25
    model(np.array([[1]])).sum().backward()
    assert model.embedding.weight.grad is not None
    assert all(p.grad is None for p in model.blocks.parameters())
    model.zero_grad()
    assert model.embedding.weight.grad is None


def test_train_and_eval_reach_every_module():
    model = Model()
    assert model.training and model.eval() is model
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


def test_to_dtype_converts_parameters_and_buffers_and_keeps_what_is_frozen():
    model = Model()
    model.head.requires_grad_(False)
    model.to_dtype(np.float64)
    assert {array.dtype for array in model.state_dict().values()} == {np.dtype(np.float64)}
    assert model.blocks[0].inner.weight.requires_grad and not model.head.bias.requires_grad
    assert model(np.array([[1]])).dtype == np.float64
    with pytest.raises(DTypeError, match="float16"):
        model.to_dtype(np.float16)


def test_repr_shows_the_tree():
    lines = repr(Model()).splitlines()
    assert lines[0] == "Model()  73 parameters"
    assert "  (embedding): Embedding(5 × 4)  20 parameters" in lines
    assert "      (inner): Linear(4 → 4, no bias)  16 parameters" in lines
    assert repr(nn.RMSNorm(3)) == "RMSNorm(3, eps=1e-05)  3 parameters"


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Module defines no forward"):
        nn.Module()(1)


# ---------------------------------------------------------------------- layers
def test_layers_have_correct_gradients():
    rng = np.random.default_rng(0)
    for layer in (nn.Linear(3, 2, rng=rng), nn.LayerNorm(3), nn.RMSNorm(3)):
        layer.to_dtype(np.float64)
        names = [name for name, _ in layer.named_parameters()]
        values = [p.data for p in layer.parameters()]

        def apply(x, *parameters, layer=layer, names=names):
            for name, parameter in zip(names, parameters):
                layer.__dict__[name] = parameter
            return layer(x)

        assert xc.gradcheck(apply, [rng.standard_normal((2, 3)), *values])


def test_dropout():
    layer = nn.Dropout(0.25, rng=np.random.default_rng(0))
    x = xc.tensor(np.ones((200, 200), np.float32), requires_grad=True)
    y = layer(x)
    assert y.dtype == np.float32 and set(np.unique(y.data)) == {0, np.float32(4 / 3)}
    assert abs((y.data == 0).mean() - 0.25) < 0.01
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)
    assert layer.eval()(x) is x
    assert nn.Dropout(0.0, rng=np.random.default_rng(0))(x) is x
    same = [nn.Dropout(0.5, rng=np.random.default_rng(3))(x).data for _ in range(2)]
    np.testing.assert_array_equal(*same)
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="dropout rate"):
            nn.Dropout(rate, rng=np.random.default_rng(0))


# ---------------------------------------------------------------------- configurations
@dataclass(frozen=True)
class Inner(Config):
    depth: int = 2
    rate: float = 0.5


@dataclass(frozen=True)
class Outer(Config):
    width: int
    inner: Inner = field(default_factory=Inner)
    name: str | None = None
    labels: tuple[str, ...] = ()
    mean: tuple[float, float] = (0.0, 1.0)


def test_a_config_is_its_own_dict():
    import json

    config = Outer(3, Inner(rate=1), "x", ("a", "b"), (1.0, 2.0))
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(width=4) == Outer(4, Inner(rate=1), "x", ("a", "b"), (1.0, 2.0))
    assert type(Outer.from_dict({"width": 1, "mean": [1, 2]}).mean[0]) is float


@pytest.mark.parametrize(
    "data, message",
    [
        ({"widht": 3}, "unknown key 'widht', did you mean 'width'"),
        ({"width": 3, "zzz": 1}, "unknown key 'zzz'; known: width, inner"),
        ({"width": 3, "inner": {"dpeth": 1}}, "Inner: unknown key 'dpeth', did you mean 'depth'"),
        ({}, "missing 1 required"),
        ([3], "needs a JSON object; got list"),
        ({"width": "3"}, r"Outer.width is '3' \(str\); expected int"),
        ({"width": True}, "Outer.width is True"),
        ({"width": 2.0}, "Outer.width is 2.0"),
        ({"width": None}, "Outer.width is None"),
        ({"width": 1, "inner": 3}, "Inner needs a JSON object; got int"),
        ({"width": 1, "inner": {"rate": "fast"}}, "Inner.rate is 'fast'"),
        ({"width": 1, "name": 3}, "Outer.name is 3"),
        ({"width": 1, "labels": "ab"}, "Outer.labels is 'ab'"),
        ({"width": 1, "labels": ["a", 3]}, r"Outer.labels\[1\] is 3"),
        ({"width": 1, "mean": [1.0]}, "Outer.mean is"),
    ],
)
def test_a_config_refuses_what_it_does_not_know(data, message):
    with pytest.raises(ConfigError, match=message):
        Outer.from_dict(data)


def test_replacing_is_as_strict():
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        Outer(3).replace(wdth=4)
    with pytest.raises(ConfigError, match="Outer.width is '4'"):
        Outer(3).replace(width="4")


def test_blank_initialisation_draws_nothing():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    with nn.init.blank():
        model = nn.Linear(3, 4, rng=rng)
        assert not nn.init.normal((2,), rng).any() and not nn.init.truncated_normal((2,), rng).any()
    assert not model.weight.data.any() and rng.bit_generator.state == before
    assert nn.Linear(3, 4, rng=rng).weight.data.all()


def test_the_gain_of_a_linear_layer_scales_its_bound():
    one, half = (nn.init.linear((50, 4), np.random.default_rng(0), gain) for gain in (1.0, 0.5))
    np.testing.assert_allclose(half, one / 2)
    assert 0.45 < np.abs(one).max() <= 0.5
