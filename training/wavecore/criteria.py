"""The four criteria for leaving the seed phase, each with its figure.

1. evaluation ≥ 80 %: graded answers of delayed recall, and held-out episodes on which every baseline is beaten;
2. tool router ≥ 70 % top-1 on held-out requests;
3. largest Lyapunov exponent < 0.1 a step, with its whole 95 % interval;
4. consolidation validated: recall falls by ≤ 2 % at a level, and ≥ 90 % is found one level up once it is wiped.
"""

import numpy as np

from training.wavecore import baselines, recall, tool_router, trainer
from training.wavecore.episodes import inputs_of
from xuramamba.wavecore import consolidation
from xuramamba.wavecore.model import inference_variables
from xuramamba.wavecore.stability import model_exponents

THRESHOLDS = {"hope_eval": 0.8, "tool_router_top1": 0.7, "lyapunov_max": 0.1, "recall_drop": 0.02,
              "recall_above": 0.9, "recall_at_100": 0.9}
LAGS = (1, 10, 100)


def recall_by_lag(model, variables, lags=LAGS, ablate=(), trials=256):
    """{lag: share of right answers}."""
    variables = inference_variables(variables)
    return {lag: recall.accuracy(model, variables, lag, ablate=ablate, trials=trials) for lag in lags}


def hope_eval(control, remembering, train_episodes, held_episodes, trials=256):
    """{"score", "recall", "episodes_won"}: control and remembering are (model, variables).

    An episode is won if the model's error on it is below that of every baseline.
    """
    grades = recall_by_lag(*remembering, trials=trials)
    won = 0
    for episode in held_episodes:
        own = trainer.evaluate(*control, [episode])
        won += own < min(baselines.losses(train_episodes, [episode]).values())
    share = won / len(held_episodes)
    return {"score": float(np.mean([*grades.values(), share])), "recall": {str(k): v for k, v in grades.items()},
            "episodes_won": share}


def router(seed=0, pairs=None):
    """(ToolRouter, its figures on held-out requests)."""
    pairs = tool_router.generated_requests(seed=seed) if pairs is None else pairs
    trained = tool_router.train(pairs, seed=seed)
    return trained, tool_router.evaluate(trained, pairs)


def stability(model, variables, episodes, trajectories=6, count=3):
    """{"lyapunov_max": mean λ₁ a step, "ci95": [low, high], "trajectories"} along held-out episodes."""
    rows = [inputs_of(episode) for episode in episodes[:trajectories]]
    length = min(row.obs.shape[1] for row in rows)
    inputs = (np.concatenate([getattr(row, name)[:, :length] for row in rows]) for name in
              ("obs", "previous", "rewards"))
    found = model_exponents(model, variables, *inputs, count=count)
    return {"lyapunov_max": found.largest, "ci95": [found.low, found.high],
            "trajectories": found.trajectories.tolist()}


def consolidate(model, variables, rows=8, pairs=24, seed=0):
    """{"level_0": {…}, …, "validated"}: items are stored by the model, then each level is condensed into the next."""
    variables = inference_variables(variables)
    trials = recall.make_trials(np.random.default_rng(seed), rows, 5, obs_dim=model.obs_dim,
                                action_dim=model.action_dim, pairs=pairs, values=model.output_dim)
    _, state = model.sequence(variables, trials.obs, trials.actions, trials.rewards)
    found, good = {}, []
    for level in range(model.config.num_levels - 1):
        state, report = consolidation.validate(model, variables["params"], state, level)
        found[f"level_{level}"] = {**report._asdict(), "validated": report.validated}
        good.append(report.validated)
    return {**found, "validated": all(good)}
