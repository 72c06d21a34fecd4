"""Several ranks are one large batch: the mathematics, between threads."""

import contextlib
import sys

import numpy as np
import pytest

from training import checkpoint, optim, parallel, schedules
from training.accumulate import TwoPass
from training.loop import Trainer, TrainerConfig, TrainingDiverged
from training.parallel import ALONE, RankError, Ranks
from training.progress import read_metrics
from xuracore import nn, ops
from xuracore.errors import ConfigError, MissingExtraError

# ---------------------------------------------------------------------- what ranks tell each other
def test_data_goes_round_in_the_order_of_the_ranks(on_ranks):
    def work(ranks):
        mine = np.full((ranks.rank + 1, 2), ranks.rank, np.float32)
        total, first = np.ones(3) * (ranks.rank + 1), np.array([ranks.rank])
        ranks.add_up(total)
        ranks.spread(first)
        turns = [list(ranks.in_turn()), ranks.gather(ranks.number)]
        return (ranks.gather({"rank": ranks.rank}), ranks.from_leader([ranks.rank]), ranks.gather_rows(mine).tolist(),
                total.tolist(), first.tolist(), ranks.part(10), turns)

    found = on_ranks(3, work)
    assert [each[:5] for each in found] == [
        ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [0], [[0, 0], [1, 1], [1, 1], [2, 2], [2, 2], [2, 2]], [6, 6, 6], [0])
    ] * 3
    assert [i for each in found for i in range(10)[each[5]]] == list(range(10))
    assert [each[6][0] for each in found] == [[0], [1], [2]]


def test_alone_everything_stays_as_it_is():
    array = np.arange(3.0)
    ALONE.add_up(array)
    ALONE.spread(array)
    assert ALONE.gather_rows(array) is array and array.tolist() == [0, 1, 2]
    assert (ALONE.gather(1), ALONE.from_leader(2), ALONE.part(5), list(ALONE.in_turn())) == ([1], 2, slice(0, 5), [0])
    assert parallel.ranks() is ALONE and ALONE.leads


def test_gradients_are_added_up_and_what_no_rank_has_stays_away(on_ranks):
    def work(ranks):
        parameters = [nn.Parameter(np.zeros(2, dtype)) for dtype in (np.float32, np.float64, np.float32, np.float32)]
        parameters[0].grad = np.array([1, 2], np.float32) * (ranks.rank + 1)
        parameters[1].grad = np.array([1.0, 0.5])
        if ranks.rank == 1:
            parameters[2].grad = np.array([4, 4], np.float32)
        total = parallel.GradientMean(parameters, ranks)
        missing = set.intersection(*map(set, ranks.gather(total.missing())))
        total(missing)
        return [None if p.grad is None else (p.grad.tolist(), p.grad.dtype.name) for p in parameters]

    assert on_ranks(2, work) == [[([1.5, 3], "float32"), ([1, 0.5], "float64"), ([2, 2], "float32"), None]] * 2


@pytest.mark.parametrize("count", [5, 1])
def test_shared_work_is_that_of_one_and_so_is_its_gradient(count, on_ranks):
    x = np.arange(2.0 * count).reshape(count, 2)

    def work(ranks):
        weight = nn.Parameter(np.array([[1.0, 2.0], [3.0, 4.0]]))
        made = parallel.shared(lambda rows: ops.matmul(rows, weight), ranks)(x)
        (made * made).sum().backward()
        array = parallel.shared(lambda rows: rows + 1, ranks)(x)
        return made.data.tolist(), array.tolist(), weight.grad

    (expected, array, gradient), = on_ranks(1, work)
    found = on_ranks(3, work)
    assert all((made, plain) == (expected, array) for made, plain, _ in found)
    np.testing.assert_allclose(np.mean([each for _, _, each in found], axis=0), gradient)


def test_ranks_drop_different_features():
    generators = [np.random.Generator(kind(3)) for kind in (np.random.PCG64, np.random.SFC64, np.random.MT19937)]
    states = [checkpoint.generator_state(g) for g in generators]
    drawn = []
    for rank in range(3):
        for generator, state in zip(generators, states):
            checkpoint.restore_generator(generator, state)
        parallel.own_chance(dict(enumerate(generators)), rank)
        drawn.append([generator.random() for generator in generators])
    assert len({value for row in drawn for value in row}) == 9


# ---------------------------------------------------------------------- training
class Towers(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.left, self.right = nn.Linear(6, 5, rng=rng), nn.Linear(4, 5, rng=rng)
        self.unused = nn.Linear(2, 2, rng=rng)
        self.dropout = nn.Dropout(0.0, rng=np.random.default_rng(1))
        self.log_scale = nn.Parameter(np.array(1.0, np.float32))


class Pairs:
    """Eight samples a batch, of which each rank holds its part."""

    def __init__(self, ranks):
        self.part = ranks.part(8)

    def batch(self, index):
        rng = np.random.default_rng(index)
        labels = rng.integers(3, size=8)
        whole = {"x": rng.standard_normal((8, 6)).astype(np.float32),
                 "y": rng.standard_normal((8, 4)).astype(np.float32), "label": labels}
        return {name: array[self.part] for name, array in whole.items()}


def towers(model, batch, rng):
    p = ops.l2_normalize(model.left(batch["x"]))
    return p, ops.l2_normalize(model.right(model.dropout(batch["y"])))


def contrast(model, features, batches):
    """Unique targets with several positives, and a term in the parameters alone."""
    p, q = features
    label = np.concatenate([batch["label"] for batch in batches])
    loss = ops.multi_positive_info_nce(p, q[:3], label, model.log_scale) + ops.info_nce(p, q, model.log_scale)
    return loss + 0.1 * (model.left.bias * model.left.bias).sum(), {"samples": len(p)}


def length(model, features, batch, batches):
    """A mean over all samples, weighted by their label, of which each rank computes its own."""
    weight = (1 + batch["label"]) / sum(1 + label for each in batches for label in each["label"])
    loss = (features[0].sum(axis=1) * weight.astype(np.float32)).sum() + 0.0 * model.log_scale
    return loss, {"length": loss.item()}


def two_pass():
    return TwoPass(towers, contrast, lambda batch: {"label": batch["label"].tolist()}, length)


def regression(model, batch, rng):
    error = model.left(batch["x"]) - model.right(model.dropout(batch["y"]))
    return (error * error).mean(), {"first": float(error.data[0, 0])}


LOSSES = {"joint": two_pass, "mean": lambda: regression}


def trainer(ranks=ALONE, folder=None, loss="joint", dropout=0.0, stream=None, batches=None, describe=None, **changes):
    model = Towers()
    model.dropout.rate = dropout
    optimizer = optim.AdamW(optim.parameter_groups(model, 0.1), lr=0.05)
    config = TrainerConfig(**{"steps": 8, "log_every": 1, "ema_decay": 0.9, "prefetch": False, **changes})
    return Trainer(model, LOSSES[loss](), optimizer, schedules.cosine(0.05, 8, 1), batches or Pairs(ranks), config,
                   folder, stream=stream, ranks=ranks, describe=describe, evaluate=lambda model, step: {"score": -step})


def digest(run):
    return checkpoint.digest({**run.model.state_dict(), **run.optimizer.state_dict(), **run.average.state_dict()})


def curve(folder):
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size, accumulate", [(2, 1), (4, 1), (2, 2)])
def test_ranks_train_as_one_large_batch_does(loss, size, accumulate, tmp_path, on_ranks):
    alone = trainer(folder=tmp_path / "alone", loss=loss, accumulate=accumulate)
    alone.run()

    def work(ranks):
        run = trainer(ranks, tmp_path / "ranks", loss, accumulate=accumulate)
        run.run()
        return run.model.state_dict(), digest(run)

    found = on_ranks(size, work)
    assert len({sha for _, sha in found}) == 1
    np.testing.assert_allclose(curve(tmp_path / "ranks"), curve(tmp_path / "alone"), rtol=2e-5)
    for name, expected in alone.model.state_dict().items():
        np.testing.assert_allclose(found[0][0][name], expected, rtol=2e-3, atol=2e-5, err_msg=name)
    if loss == "joint":
        assert read_metrics(tmp_path / "ranks" / "metrics.jsonl")[0]["samples"] == 8 * accumulate


def test_a_resumed_run_of_several_ranks_has_the_same_bits(tmp_path, on_ranks):
    def work(stop_at, resume, folder):
        def run_it(ranks):
            run = trainer(ranks, folder, dropout=0.5, accumulate=2, describe={"batch_size": 8})
            if resume and not ranks.leads:
                run.output_dir = tmp_path / "on another machine"  # which does not see rank 0's files
                run.model.left.weight.data[...] = 0
            run.run(resume=resume, stop_at=stop_at)
            return digest(run)

        return on_ranks(2, run_it)

    whole = work(None, False, tmp_path / "whole")
    work(3, False, tmp_path / "parts")
    assert work(None, True, tmp_path / "parts") == whole and len(set(whole)) == 1
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert not (tmp_path / "on another machine").exists()


def test_another_number_of_ranks_is_warned_of_and_another_batch_refused(tmp_path, on_ranks):
    on_ranks(2, lambda ranks: trainer(ranks, tmp_path, describe={"batch_size": 8}).run(stop_at=3))
    with pytest.warns(RuntimeWarning, match="used 2 ranks, now there are 1"):
        run = trainer(folder=tmp_path, describe={"batch_size": 8})
        assert run.run(resume=True, stop_at=4).step == 4
    with pytest.raises(ConfigError, match="batch_size was 8, is 4"):
        trainer(folder=tmp_path, describe={"batch_size": 4}).run(resume=True)


def test_one_rank_that_is_told_to_stop_stops_all(tmp_path, on_ranks):
    def work(ranks):
        run = trainer(ranks, tmp_path)
        if ranks.rank == 1:
            run.after_step = lambda model: setattr(run.interruption, "asked", "SIGTERM" if run.step == 4 else None)
        result = run.run()
        return result.step, result.reason, result.exit_code

    assert on_ranks(2, work) == [(6, "SIGTERM", 0)] * 2
    assert checkpoint_step(tmp_path) == 6


def checkpoint_step(folder):
    run = trainer(folder=folder)
    with pytest.warns(RuntimeWarning):
        run.resume()
    return run.step


def test_rank_0_alone_evaluates_speaks_and_writes_and_all_stop_with_it(tmp_path, on_ranks):
    def work(ranks):
        run = trainer(ranks, tmp_path / str(ranks.rank), evaluate_every=2, monitor="score", patience=2)
        result = run.run()
        run.adopt()
        return result.step, result.reason, digest(run)

    found = on_ranks(2, work)
    assert found[0] == found[1] and found[0][:2] == (6, "patience")
    assert {path.name for path in tmp_path.iterdir()} == {"0"} and (tmp_path / "0" / "best").is_dir()


def test_a_number_that_is_not_finite_on_one_rank_is_skipped_on_all(on_ranks):
    class Poisoned(Pairs):
        def batch(self, index):
            found = super().batch(index)
            if index >= 2 and self.part.start:
                found["x"] = found["x"] * np.float32("nan")
            return found

    for loss in LOSSES:
        def work(ranks, loss=loss):
            run = trainer(ranks, loss=loss, batches=Poisoned(ranks), max_skips=3)
            with contextlib.suppress(TrainingDiverged):
                run.run()
            return run.skipped, np.isfinite(run.model.left.weight.data).all()

        assert on_ranks(2, work) == [(3, True)] * 2


def test_ranks_that_were_not_started_alike_are_refused(tmp_path, on_ranks):
    with pytest.raises(RankError, match="different options"):
        on_ranks(2, lambda ranks: trainer(ranks, seed=ranks.rank).run())


def test_ranks_that_drifted_apart_are_found_before_a_checkpoint_is_written(tmp_path, on_ranks):
    def work(ranks):
        run = trainer(ranks, tmp_path, save_every=2)
        if ranks.rank:
            run.after_step = lambda model: model.left.weight.data.__iadd__(1e-3)
        run.run()

    with pytest.raises(RankError, match="different weights after step 2"):
        on_ranks(2, work)
    assert not list((tmp_path / "checkpoints").glob("step*"))


def test_an_error_on_one_rank_ends_all(on_ranks):
    def work(ranks):
        run = trainer(ranks)
        if ranks.rank:
            run.batches = None  # fails at once
        run.run()

    with pytest.raises(AttributeError):
        on_ranks(2, work)


def test_what_ranks_need_to_share_must_be_said(on_ranks):
    def work(ranks):
        run = trainer(ranks)
        run.loss_function = TwoPass(towers, contrast)
        run.run()

    with pytest.raises(ConfigError, match="share="):
        on_ranks(2, work)


# ---------------------------------------------------------------------- starting and ending
@pytest.fixture
def no_launcher(monkeypatch):
    for name in parallel.SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel, "_ranks", [None])


@pytest.mark.parametrize("name", parallel.SIZES)
def test_a_launcher_is_known_by_its_environment_and_names_the_extra(name, no_launcher, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert parallel.launched() == 1 and parallel.ranks() is ALONE
    monkeypatch.setenv(name, "1")
    assert parallel.ranks() is ALONE
    monkeypatch.setenv(name, "2")
    assert parallel.launched() == 2
    with pytest.raises(MissingExtraError, match=r"xura\[mpi\]"):
        parallel.ranks()
    monkeypatch.delenv(name)
    with pytest.raises(MissingExtraError):
        parallel.ranks(asked=True)


@pytest.mark.parametrize("bound, expected", [({0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}, [2, 2]), ({0: {0, 1}, 1: {2}}, [1, 1]),
                                             ({0: {0}, 1: {0}}, [1, 1])])
def test_ranks_share_the_processors_of_their_machine(bound, expected, on_ranks, monkeypatch):
    monkeypatch.setattr(parallel.xc, "get_num_threads", lambda: 8)

    def work(ranks):
        monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: bound[ranks.rank], raising=False)
        return parallel.threads_per_rank(ranks)

    assert on_ranks(2, work) == expected


class Aborting(Ranks):
    size = 2

    def __init__(self):
        self.codes = []

    def abort(self, code):
        self.codes.append(code)


@pytest.mark.parametrize("error, code", [
    (ConfigError("no"), 2), (TrainingDiverged("nan"), 1), (ValueError("bug"), 1), (KeyboardInterrupt(), 130),
    (SystemExit(2), 2), (SystemExit("text"), 1),
])
def test_an_error_in_a_script_ends_all_ranks_with_its_code(error, code, no_launcher, capsys):
    found = parallel._ranks[0] = Aborting()

    @parallel.together
    def main(argv=None):
        raise error

    with pytest.raises(type(error)):
        main([])
    assert found.codes == [code]
    assert str(error) in capsys.readouterr().err or isinstance(error, SystemExit)


def test_a_script_that_ends_well_ends_no_other(no_launcher):
    found = parallel._ranks[0] = Aborting()
    assert parallel.together(lambda argv=None: 0)([]) == 0
    with pytest.raises(SystemExit):
        parallel.together(lambda argv=None: sys.exit(0))([])
    assert found.codes == []
