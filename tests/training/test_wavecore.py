"""WaveCore learns from episodes: what is refused, what is fed, which group changes when, and that it learns."""

import json

import numpy as np
import pytest

from training.scripts import local_sanity_check, train_seed_model, wavecore_criteria, wavecore_loops
from training.scripts import tool_router as tool_router_script
from training.wavecore import baselines, episodes, loops, recall, simulate, tool_router, trainer
from training.wavecore.episodes import RLDSValidationError, episode_from
from training.wavecore.nested import NestedAdam, group_of
from training.wavecore.proof import prove
from xuracore.errors import ConfigError, FormatError, GradError
from xuramamba.wavecore import CoreModelConfig, inference_variables, make_core_model
from xuramamba.wavecore.checkpoint import load_model, save_model
from xuramamba.wavecore.parameters import flatten
from xuramamba.wavecore.session import InferenceRouter

TINY = CoreModelConfig.seed(d_s=16, d_w=16, d_p=8, d_e=16, d_k=8, d_c=16, cms_sizes=(4, 6, 8), cms_dims=(8, 8, 16))


def simulated(count=6, length=20, dims=(64, 7)):
    data = [simulate.simulate(np.random.default_rng(i), simulate.KINDS[i % 2], length) for i in range(count)]
    return [episode_from(one, *dims) for one in data]


def plain(length=3):
    return {"steps": [{"timestamp": 0.1 * t, "observation": {"x": [1.0, t]}, "action": {"command": [0.5]},
                       "reward": 0.0, "is_terminal": t == length - 1} for t in range(length)]}


# ---------------------------------------------------------------------- episodes
@pytest.mark.parametrize("change, message", [
    (lambda e: e.pop("steps"), "at least one step"), (lambda e: e["steps"].clear(), "at least one step"),
    (lambda e: e["steps"].__setitem__(1, 5), "'step 1': is a int"),
    (lambda e: e["steps"][1].pop("observation"), "no observation"),
    (lambda e: e["steps"][1].pop("action"), "no action"),
    (lambda e: e["steps"][1]["action"].pop("command"), "no command"),
    (lambda e: e["steps"][1]["observation"].update(x=[1.0]), "step 0 has 2 and 1"),
    (lambda e: e["steps"][1]["action"].update(command=[1.0, 2.0]), "command of 2"),
    (lambda e: e["steps"][1]["observation"].update(x=[1.0, float("nan")]), "finite"),
    (lambda e: e["steps"][1].update(reward=float("inf")), "reward"), (lambda e: e["steps"][1].update(reward="1"), "reward"),
    (lambda e: e["steps"][2].update(timestamp=0.05), "goes back"),
    (lambda e: e["steps"][1].update(is_terminal=1), "is_terminal"),
])  # fmt: skip
def test_a_malformed_episode_is_named(change, message):
    data = plain()
    change(data)
    with pytest.raises(RLDSValidationError, match=message):
        episode_from(data, 4, 2, "one.json")


def test_validator_reads_all_files_and_lists_all_issues(tmp_path):
    simulate.generate(tmp_path, 3, length=5)
    found = episodes.validate(tmp_path)
    assert found == (3, 3, 15, [], True)
    (tmp_path / "bad.json").write_text('{"steps": [')
    (tmp_path / "nan.json").write_text(json.dumps(plain()).replace("0.5", "NaN"))
    found = episodes.validate(tmp_path)
    assert (found.total_files, found.trainable_files, found.total_steps, found.is_valid) == (5, 3, 15, False)
    assert len(found.issues) == 2 and "NaN is not a JSON number" in found.issues[1]
    with pytest.raises(RLDSValidationError, match="bad.json"):
        episodes.validate(tmp_path, raise_if_invalid=True)
    with pytest.raises(RLDSValidationError, match="no .json"):
        episodes.load_episodes(tmp_path / "none", 4, 2)


def test_vectors_have_known_parts_first_and_a_tail_for_plans():
    observation = {"zoom": 9, "pose": {"position": [3, 4]}, "robot_state": {"joint_positions": [1, 2], "hot": True},
                   "name": "arm"}
    assert episodes.observation_vector(observation) == [1, 2, 3, 4, 1.0, 9]
    action = {"command": [0.5], "planner": {"intent": "go", "plan_steps": ["a"]}, "tool_calls": [{"name": "drive"}]}
    vector = episodes.action_vector(action, 32)
    assert vector[:16] == [0.5] + [0.0] * 15 and len(vector) == 32 and max(map(abs, vector[16:])) <= 1
    assert vector != episodes.action_vector({**action, "tool_calls": [{"name": "stop"}]}, 32)
    assert episodes.action_vector(action, 7) == [0.5] + [0.0] * 6


def test_a_step_sees_the_action_before_and_never_its_own():
    episode = simulated(1)[0]
    batch = episodes.inputs_of(episode)
    np.testing.assert_array_equal(batch.previous[0, 1:], episode.actions[:-1])
    np.testing.assert_array_equal(batch.target[0], episode.actions)
    np.testing.assert_array_equal(batch.rewards[0, 1:, 0], episode.rewards[:-1])
    assert not batch.previous[0, 0].any() and batch.resets[0].tolist() == [True] + [False] * 19
    joined = episodes.Episode(*(np.concatenate([x, x]) for x in episode))
    batch = episodes.inputs_of(joined)
    assert batch.resets[0].nonzero()[0].tolist() == [0, 20] and not batch.previous[0, 20].any()


def test_streams_go_on_where_they_stopped():
    data = simulated(3, 10)
    stream = iter(episodes.Streams(data, 2, 4, np.random.default_rng(0)))
    together = np.concatenate([next(stream).target for _ in range(5)], axis=1)  # 20 steps: two whole episodes
    known = {episode.actions.tobytes() for episode in data}
    for row in together:
        assert {row[:10].tobytes(), row[10:].tobytes()} <= known


def test_baselines_are_what_they_say():
    data = simulated(8)
    train, held = data[:6], data[6:]
    found = baselines.losses(train, held)
    moved = [np.concatenate([np.zeros((1, 7)), e.actions[:-1]]) - e.actions for e in held]
    assert found["persistence_loss"] == pytest.approx(np.mean(np.square(np.concatenate(moved))), rel=1e-5)
    assert set(found) == {"persistence_loss", "mean_action_loss", "linear_loss"}


# ---------------------------------------------------------------------- learning
def test_only_the_groups_that_are_due_change():
    model, variables = make_core_model(0, 64, 7, 7, TINY)
    params = variables["params"]
    flat = flatten(params)
    assert {group_of(name) for name in flat} == {"fast", "mid", "slow"}
    optimizer, rng = NestedAdam(params, 1e-2, {"fast": 1, "mid": 2, "slow": 4}), np.random.default_rng(0)
    for step in range(1, 9):
        before = {name: p.data.copy() for name, p in flat.items()}
        for p in flat.values():
            slope = rng.standard_normal(p.shape).astype(np.float32)
            p.grad = slope if p.grad is None else p.grad + slope
        due = optimizer.step()
        changed = {group_of(name) for name, p in flat.items() if (p.data != before[name]).any()}
        assert changed == set(due) == {g for g, n in (("fast", 1), ("mid", 2), ("slow", 4)) if step % n == 0}


def test_a_slow_group_learns_from_the_mean_of_its_stretch():
    _, variables = make_core_model(0, 64, 7, 7, TINY)
    flat = flatten(variables["params"])
    optimizer = NestedAdam(variables["params"], 1e-2, {"fast": 1, "mid": 1, "slow": 2}, clip=1e9)
    bias = flat["encoder/obs/out/bias"]
    for value in (1.0, 3.0):
        bias.grad = np.full(bias.shape, value, np.float32) + (0 if bias.grad is None else bias.grad)
        optimizer.step()
    mean = optimizer.optimizers["slow"].state_dict()["mean.encoder/obs/out/bias"]
    np.testing.assert_allclose(mean, 0.1 * 2.0, rtol=1e-5)
    bias.grad = np.full(bias.shape, np.nan, np.float32)
    optimizer.step()
    before = bias.data.copy()
    with pytest.raises(GradError, match="not finite"):
        optimizer.step()
    np.testing.assert_array_equal(bias.data, before)
    with pytest.raises(ConfigError):
        NestedAdam(variables["params"], periods={"fast": 0})


def test_training_lowers_the_error_on_episodes_never_seen():
    data = simulated(24, 10)
    model, variables = make_core_model(0, 64, 7, 7, TINY)
    before = trainer.evaluate(model, variables, data[20:])
    rows = trainer.train(model, variables["params"], data[:20], steps=30, batch=8, length=5, lr=5e-3,
                         periods={"fast": 1, "mid": 1, "slow": 2})
    assert list(rows[0]) == list(trainer.COLUMNS)
    assert trainer.evaluate(model, variables, data[20:]) < 0.8 * before


def test_trials_can_only_be_answered_from_memory():
    trials = recall.make_trials(np.random.default_rng(0), 64, 5)
    assert trials.obs.shape == (64, 9, 64) and trials.rewards[:, :4].all() and not trials.rewards[:, 4:].any()
    key = trials.obs[:, -1, : recall.KEY_DIM]
    where = np.abs(trials.obs[:, :4, : recall.KEY_DIM] - key[:, None]).sum(-1).argmin(1)
    shown = trials.obs[np.arange(64), where, recall.KEY_DIM :].argmax(1)
    np.testing.assert_array_equal(shown, trials.answer)
    assert trials.obs[:, -1, recall.KEY_DIM : recall.KEY_DIM + 7].sum() == 0  # the question holds no value


@pytest.mark.slow
def test_delayed_recall_needs_the_memory():
    """About a minute: 90 % over a lag of 40 with CMS, chance without."""
    model, variables = make_core_model(0, 64, 7, 7, CoreModelConfig.seed(output_type="discrete"))
    recall.train(model, variables["params"], steps=320, lr=1e-3, lags=(2, 40))
    plain_variables = inference_variables(variables)
    assert recall.accuracy(model, plain_variables, 40) >= 0.9
    assert recall.accuracy(model, plain_variables, 40, ablate=("cms",)) <= 0.3


# ---------------------------------------------------------------------- tool router and criteria
def test_tool_router_never_trains_on_what_it_is_graded_on(tmp_path):
    pairs = tool_router.generated_requests(600)
    liars = [(text, "wrong") for text, _ in pairs if tool_router.held_out(text)]
    router, clean = tool_router.train(pairs + liars, steps=150), tool_router.train(pairs, steps=150)
    np.testing.assert_array_equal(router.weight, clean.weight)
    assert tool_router.evaluate(clean, pairs)["top1"] >= 0.7
    clean.save(tmp_path)
    assert tool_router.ToolRouter.load(tmp_path).infer("please drive to the kitchen")[0][0] == "navigate"
    (tmp_path / "tool_router_manifest.json").write_text('{"tools": ["one"]}')
    with pytest.raises(FormatError, match="do not fit"):
        tool_router.ToolRouter.load(tmp_path)


@pytest.mark.slow
def test_the_proof_has_every_figure_and_an_honest_verdict(tmp_path):
    proof = prove(tmp_path, count=10, steps=2, recall_steps=2, recall_lag=4, trials=8)
    assert proof["verdict"] == "fail" and not proof["checks"]["recall_at_100"]  # two steps teach nothing
    written = json.loads((tmp_path / "proof_of_learning.json").read_text())
    assert {"created", "seed", "git_rev", "data", "baseline", "trained", "improvement_pct", "param_delta_l2",
            "per_module_grad_norm", "cms", "stability", "ablations", "verdict", "thresholds"} <= set(written)
    assert set(written["baseline"]) == {"untrained_loss", "persistence_loss", "mean_action_loss", "linear_loss"}
    assert set(written["cms"]["recall_accuracy_at"]) == {"1", "10", "100"}
    assert set(written["ablations"]) == {"no_cms", "no_wave", "no_particle"}
    model, variables = load_model(tmp_path)
    assert model.param_count(variables) == 172_202
    assert wavecore_criteria.main(["--checkpoint-dir", str(tmp_path), "--rlds-dir", str(tmp_path / "episodes"),
                                   "--trials", "8"]) == 1


# ---------------------------------------------------------------------- commands
def test_sanity_check_writes_its_rows(tmp_path, capsys):
    arguments = ["--use-synthetic", "--episodes", "2", "--max-steps", "2", "--batch-size", "2", "--arch-preset",
                 "development", "--metrics-path", str(tmp_path / "m.csv"), "--checkpoint-dir", str(tmp_path / "c")]
    assert local_sanity_check.main(arguments) == 0
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert lines[0] == "step,loss,elapsed_s,mse_main,mse_imagination_tail,imagination_tail_dims" and len(lines) == 3
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert InferenceRouter.from_pretrained(tmp_path / "c").model.obs_dim == 128


def test_seed_training_saves_goes_on_and_promotes(tmp_path, capsys):
    arguments = ["--steps", "2", "--batch-size", "2", "--episodes", "5", "--arch-preset", "development",
                 "--checkpoint-dir", str(tmp_path / "seed"), "--save-every", "1"]
    assert train_seed_model.main(arguments) == 0
    assert train_seed_model.main([*arguments, "--continue", "--promote"]) == 0
    assert sorted(path.name for path in (tmp_path / "seed").glob("params_step_*")) == [
        f"params_step_{n}" for n in (1, 2, 3, 4)]
    about = json.loads((tmp_path / "seed_stable" / "manifest.json").read_text())
    assert about["type"] == "stable_seed_model" and about["training"]["steps"] == 4
    assert about["model"]["architecture"] == "wavecore_cms"
    assert '"heldout_loss"' in capsys.readouterr().out


def test_loops_train_one_model_and_export_it(tmp_path):
    simulate.generate(tmp_path / "rlds", 2, length=16)
    quick = {"max_steps": 1, "batch_size": 2, "arch_preset": "development", "rlds_dir": str(tmp_path / "rlds")}
    result = loops.run({**dict.fromkeys(loops.LOOPS, quick), "quantization": "int8"}, tmp_path)
    assert result["status"] == "ok" and result["fast"]["request"]["learning_rate"] == 1e-3
    assert result["fast"]["checkpoint_dir"] is None and result["slow"]["checkpoint_step"] == 3
    assert json.loads((tmp_path / "trainer" / "status.json").read_text())["status"] == "ok"
    assert InferenceRouter.from_pretrained(tmp_path / "export").model.output_dim == 32
    for wrong in ({"fats": {}}, {"fast": {"steps": 1}}, {"fast": {"obs_dim": 3}}):
        with pytest.raises(ConfigError):
            loops.run(wrong, tmp_path)
    with pytest.raises(RLDSValidationError):
        loops.run({name: {**quick, "rlds_dir": str(tmp_path / "none")} for name in loops.LOOPS}, tmp_path)
    assert json.loads((tmp_path / "trainer" / "status.json").read_text())["status"] == "error"
    assert wavecore_loops.main(["--output-dir", str(tmp_path / "w"), "--payload", json.dumps(
        dict.fromkeys(loops.LOOPS, quick))]) == 0


def test_criteria_command_measures_what_is_asked(tmp_path, capsys):
    save_model(tmp_path, *make_core_model(0, 64, 7, 7, TINY), {"final_loss": 1.0, "rlds_episodes": 0})
    code = wavecore_criteria.main(["--checkpoint-dir", str(tmp_path), "--episodes", "5", "--only", "lyapunov"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["lyapunov"] and found["lyapunov"]["met"] == (code == 0)
    assert found["lyapunov"]["ci95"][0] <= found["lyapunov"]["lyapunov_max"] <= found["lyapunov"]["ci95"][1]


def test_tool_router_commands(tmp_path, capsys):
    folder = str(tmp_path)
    assert tool_router_script.main(["train", "--output-dir", folder, "--steps", "100"]) == 0
    assert tool_router_script.main(["eval", "--model-path", folder]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] > 0.7
    assert tool_router_script.main(["infer", "--model-path", folder, "charge the battery"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tool"] == "charge"
