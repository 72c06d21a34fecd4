"""A module under any sequence of additions, removals, ties, freezes, saves and loads equals a dict."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xuracore import nn
from xuracore.io import load_safetensors, read_metadata, save_safetensors
from xuracore.nn.module import StateDictError

PATHS = [(), ("a",), ("b",), ("a", "c"), ("a", "c", "d")]
NAMES = ["weight", "bias", "x"]
SHAPES = [(), (2,), (2, 3)]


class ModuleAgainstDict(RuleBasedStateMachine):
    """``entries``: {full name: (key of the array, buffer or not)} in the order of assignment of each module."""

    @initialize()
    def start(self):
        self.root, self.entries, self.values, self.frozen, self.next = nn.Module(), {}, {}, set(), 0
        self.saved = None
        for path in PATHS[1:]:
            setattr(self.module(path[:-1]), path[-1], nn.Module())

    def module(self, path):
        found = self.root
        for name in path:
            found = getattr(found, name)
        return found

    def put(self, path, name, key, buffer):
        self.entries.pop(".".join((*path, name)), None)  # ``setattr`` after ``delattr``: at the end
        self.entries[".".join((*path, name))] = key, buffer

    def remove_old(self, path, name):
        module = self.module(path)
        if name in vars(module):
            delattr(module, name)
            vars(module).get("_buffers", set()).discard(name)

    @rule(path=st.sampled_from(PATHS), name=st.sampled_from(NAMES), shape=st.sampled_from(SHAPES), buffer=st.booleans())
    def add(self, path, name, shape, buffer):
        self.remove_old(path, name)
        array = np.full(shape, self.next, np.float32)
        if buffer:
            self.module(path).register_buffer(name, array)
        else:
            setattr(self.module(path), name, nn.Parameter(array))
        self.values[self.next] = array.copy()
        self.put(path, name, self.next, buffer)
        self.next += 1

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def remove(self, data):
        full = data.draw(st.sampled_from(sorted(self.entries)))
        *path, name = full.split(".")
        self.remove_old(path, name)
        del self.entries[full]

    @precondition(lambda self: any(not buffer for _, buffer in self.entries.values()))
    @rule(data=st.data(), path=st.sampled_from(PATHS), name=st.sampled_from(NAMES))
    def tie(self, data, path, name):
        full = data.draw(st.sampled_from(sorted(n for n, (_, buffer) in self.entries.items() if not buffer)))
        *other, last = full.split(".")
        parameter = getattr(self.module(other), last)
        key = self.entries[full][0]
        self.remove_old(path, name)
        setattr(self.module(path), name, parameter)
        self.put(path, name, key, False)

    @rule(path=st.sampled_from(PATHS), trained=st.booleans())
    def freeze(self, path, trained):
        self.module(path).requires_grad_(trained)
        prefix = ".".join(path)
        for full, (key, buffer) in self.entries.items():
            if not buffer and (full.startswith(prefix + ".") or not prefix):
                (self.frozen.discard if trained else self.frozen.add)(key)

    @rule()
    def save(self):
        self.saved = {name: array.copy() for name, array in self.root.state_dict().items()}

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        expected = self.expected()
        fits = {n: a.shape for n, a in self.saved.items()} == {n: self.values[k].shape for n, k in expected.items()}
        if fits:
            self.root.load_state_dict(self.saved)
            for name, key in expected.items():
                self.values[key] = self.saved[name].copy()
        elif set(self.saved) - set(self.entries):
            with pytest.raises(StateDictError):
                self.root.load_state_dict(self.saved)

    @rule()
    def change(self):
        for key, parameter in {k: p for p, k in self.parameters()}.items():
            parameter.data[...] = self.next
            self.values[key] = np.full_like(self.values[key], self.next)
            self.next += 1

    def parameters(self):
        for full, (key, buffer) in self.entries.items():
            if not buffer:
                *path, name = full.split(".")
                yield getattr(self.module(path), name), key

    def expected(self):
        """{name: key} of the state: parameters under their first name in the order of the tree, then buffers."""
        first, buffers = {}, {}

        def visit(path):
            prefix = ".".join(path)
            for full, (key, buffer) in self.entries.items():
                if full.rpartition(".")[0] == prefix:
                    (buffers if buffer else first).setdefault(full if buffer else key, key if buffer else full)
            for child in PATHS[1:]:
                if child[:-1] == path:
                    visit(child)

        visit(())
        return {**{full: key for key, full in first.items()}, **buffers}

    @invariant()
    def equal(self):
        state, expected = self.root.state_dict(), self.expected()
        assert list(state) == list(expected)
        for name, key in expected.items():
            np.testing.assert_array_equal(state[name], self.values[key])
        keys = {key for key, buffer in self.entries.values() if not buffer}
        assert self.root.parameter_count() == sum(self.values[key].size for key in keys)
        trained = self.root.parameter_count(trainable_only=True)
        assert trained == sum(self.values[key].size for key in keys - self.frozen)
        ties = {n: k for n, (k, buffer) in self.entries.items() if not buffer and n not in expected}
        assert {n: expected[first] for n, first in self.root.aliases().items()} == ties
        assert repr(self.root).count("tied to") == len(ties)


ModuleAgainstDict.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestModuleAgainstDict = ModuleAgainstDict.TestCase


def test_ties_are_saved_once_and_remembered_beside(tmp_path):
    model = nn.Module()
    model.embedding = nn.Embedding(3, 2, rng=np.random.default_rng(0))
    model.head = nn.Linear(2, 3, rng=np.random.default_rng(1))
    model.head.weight = model.embedding.weight
    assert model.aliases() == {"head.weight": "embedding.weight"}
    save_safetensors(tmp_path / "m.safetensors", model.state_dict(), metadata=model.aliases())
    state, metadata = (read(tmp_path / "m.safetensors") for read in (load_safetensors, read_metadata))
    assert set(state) == {"embedding.weight", "head.bias"} and metadata["head.weight"] in state
    model.load_state_dict(state)
    assert model.head.weight is model.embedding.weight


def test_loading_reports_wrong_types_with_all_else():
    model = nn.Module()
    model.layer = nn.Linear(2, 2, rng=np.random.default_rng(0))
    model.register_buffer("steps", np.zeros(2, np.int64))
    state = {"layer.weight": np.zeros((3, 2)), "layer.bais": np.zeros(2), "steps": np.array([0.5, 1.0])}
    with pytest.raises(StateDictError) as caught:
        model.load_state_dict(state)
    for part in (
        "wrong shape (1): layer.weight: file (3, 2), model (2, 2)", "missing (1): layer.bias",
        "unexpected (1): layer.bais", "wrong dtype (1): steps: file float64, model int64",
    ):
        assert part in str(caught.value)
    model.load_state_dict({"steps": np.array([3, 4], np.int32)}, strict=False)
    assert model.steps.tolist() == [3, 4]


def test_repr_marks_what_is_frozen_tied_and_kept():
    model = nn.Module()
    model.layer = nn.Linear(2, 3, rng=np.random.default_rng(0)).requires_grad_(False)
    model.gain = nn.Parameter([1.0, 2.0])
    model.again = model.layer
    model.register_buffer("mean", np.zeros(4))
    assert repr(model).splitlines() == [
        "Module()  11 parameters, 9 frozen",
        "  (layer): Linear(2 → 3)  9 parameters, frozen",
        "  gain: (2,)",
        "  (again): the same as layer",
        "  mean: buffer (4,) float64",
        "11 parameters, 9 frozen; 0.1 kB with buffers",
    ]
