"""The proof of learning: everything from simulated data to a verdict, in one call.

Two models of the same 172,202 parameters are trained: one for control from episodes, one for delayed recall.
"""

import subprocess
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from training.wavecore import baselines, criteria, episodes, recall, simulate, trainer
from xuracore import ops
from xuracore.autograd import gradients
from xuracore.config import require
from xuracore.io.strict_json import save_json
from xuramamba.wavecore import CoreModelConfig, make_core_model
from xuramamba.wavecore.checkpoint import save_model
from xuramamba.wavecore.parameters import arrays, flatten

OBS, ACTION = 64, simulate.JOINTS
PERIODS = {"fast": 1, "mid": 1, "slow": 2}  # shorter than the default: the proof has a thousand steps, not a million
RATES = {"fast": 1.0, "mid": 1.0, "slow": 1.0}
CLIP = 1.0  # the default of 10 lets single batches undo a hundred steps at this learning rate


def prove(folder, *, seed=0, rlds_dir=None, count=640, steps=2400, recall_steps=420, recall_lag=110, trials=256,
          lr=2e-3, say=lambda text: None):
    """Train, measure, write checkpoint and proof_of_learning.json into ``folder``, and return the proof."""
    require(count >= 10, f"count={count}; expected at least 10 episodes")
    folder = Path(folder)
    if rlds_dir is None:
        rlds_dir = folder / "episodes"
        simulate.generate(rlds_dir, count, seed)
        say(f"{count} episodes simulated in {rlds_dir}")
    data = episodes.load_episodes(rlds_dir, OBS, ACTION)
    held, train = data[::5], [episode for i, episode in enumerate(data) if i % 5]
    require(train and held, f"{len(data)} episodes; expected at least 2")
    base = baselines.losses(train, held)

    # ------------------------------------------------------------------ control
    model, variables = make_core_model(seed, OBS, ACTION, ACTION, CoreModelConfig.seed(gradient_clip=CLIP))
    params = variables["params"]
    start, untrained = arrays(params), trainer.evaluate(model, variables, held)
    say(f"baselines {_rounded(base)}, untrained {untrained:.4f}")

    def report(row):
        if row["step"] % 100 == 0:
            say(f"control {row['step']}/{steps}: loss {row['loss']:.4f}, {row['elapsed_s']:.0f} s")

    trainer.train(model, params, train, steps=steps, lr=lr, periods=PERIODS, rates=RATES, seed=seed, report=report)
    trained = {"train_loss": trainer.evaluate(model, variables, train[: len(held)]),
               "heldout_loss": trainer.evaluate(model, variables, held)}
    ablations = {f"no_{part}": trainer.evaluate(model, variables, held, (part,)) for part in
                 ("cms", "wave", "particle")}
    say(f"held-out loss {trained['heldout_loss']:.4f}; without a part {_rounded(ablations)}")

    # ------------------------------------------------------------------ recall
    remembering = make_core_model(seed, OBS, ACTION, ACTION, CoreModelConfig.seed(output_type="discrete"))
    plain = make_core_model(seed, OBS, ACTION, ACTION, CoreModelConfig.seed(output_type="discrete"))

    def report_recall(step, loss, reach):
        if step % 100 == 99:
            say(f"recall {step + 1}/{recall_steps}: loss {loss:.3f}, lags up to {reach:.0f}")

    recall_loss = recall.train(remembering[0], remembering[1]["params"], steps=recall_steps, lr=1e-3, seed=seed,
                               lags=(2, recall_lag), report=report_recall)
    recall.train(plain[0], plain[1]["params"], steps=recall_steps, lr=1e-3, seed=seed, lags=(2, recall_lag),
                 ablate=("cms",))
    with_cms = criteria.recall_by_lag(*remembering, trials=trials)
    silenced = criteria.recall_by_lag(*remembering, ablate=("cms",), trials=trials)
    without = criteria.recall_by_lag(*plain, ablate=("cms",), trials=trials)
    say(f"recall by lag {with_cms}; silenced {silenced}; trained without {without}")

    # ------------------------------------------------------------------ criteria
    stability = criteria.stability(model, variables, held)
    evaluation = criteria.hope_eval((model, variables), remembering, train, held, trials)
    router, top = criteria.router(seed)
    consolidated = criteria.consolidate(*remembering, seed=seed)
    chance, best, limits = 1 / ACTION, min(base.values()), criteria.THRESHOLDS
    checks = {
        "beats_baselines": trained["heldout_loss"] < best,
        "recall_at_100": with_cms[100] >= limits["recall_at_100"],
        "chance_without_cms": max(without[100], silenced[100]) <= chance + 0.1,
        "hope_eval": evaluation["score"] >= limits["hope_eval"],
        "tool_router": top["top1"] >= limits["tool_router_top1"],
        "lyapunov": stability["ci95"][1] < limits["lyapunov_max"],
        "consolidation": consolidated["validated"],
    }
    proof = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seed": seed, "git_rev": _revision(),
        "data": {"episodes_train": len(train), "episodes_heldout": len(held), "hash": episodes.fingerprint(data)},
        "baseline": {"untrained_loss": untrained, **base},
        "trained": trained,
        "improvement_pct": 100 * (1 - trained["heldout_loss"] / best),
        "param_delta_l2": _distance(start, arrays(params)),
        "per_module_grad_norm": _gradient_norms(model, params, train[:8]),
        "cms": {"recall_accuracy_at": {str(lag): value for lag, value in with_cms.items()}, "chance": chance,
                "silenced": {str(lag): value for lag, value in silenced.items()},
                "trained_without": {str(lag): value for lag, value in without.items()}},
        "stability": stability,
        "ablations": ablations,
        "hope_eval": evaluation, "tool_router": top, "consolidation": consolidated,
        "checks": {name: bool(value) for name, value in checks.items()},
        "verdict": "pass" if all(checks.values()) else "fail",
        "thresholds": limits,
    }  # fmt: skip
    about = {"final_loss": trained["heldout_loss"], "rlds_episodes": len(data)}
    save_model(folder, model, variables, about)
    save_model(folder / "recall", *remembering, {"final_loss": recall_loss, "rlds_episodes": 0})
    router.save(folder / "tool_router")
    save_json(folder / "proof_of_learning.json", proof)
    return proof


def _rounded(values):
    return {name: round(value, 4) for name, value in values.items()}


def _distance(before, after):
    one, two = flatten(before), flatten(after)
    return float(np.sqrt(sum(np.square(two[name] - one[name], dtype=np.float64).sum() for name in one)))


def _gradient_norms(model, params, some):
    rows = [episodes.inputs_of(episode) for episode in some]
    obs, previous, rewards, target, resets = (np.concatenate([x[:, :32] for x in parts]) for parts in zip(*rows))
    outputs, _ = model.sequence(params, obs, previous, rewards, resets=resets)
    flat = flatten(params)
    found = gradients(ops.mse_loss(outputs, target), list(flat.values()))
    norms = {}
    for name, gradient in zip(flat, found):
        module = name.partition("/")[0]
        norms[module] = norms.get(module, 0.0) + float(np.square(gradient, dtype=np.float64).sum())
    return {module: norm**0.5 for module, norm in norms.items()}


def _revision():
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True, timeout=10, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
