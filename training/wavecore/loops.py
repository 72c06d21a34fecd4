"""The three loops of the published trainer: fast, mid and slow, one after the other, each at its own rate.

Only the slow loop saves and exports.  What each one did is in the result and in ``trainer/status.json``.
"""

import csv
from pathlib import Path

from training.wavecore import simulate, trainer
from training.wavecore.episodes import load_episodes
from xuracore.config import require
from xuracore.io.strict_json import save_json
from xuramamba.wavecore import CoreModelConfig, make_core_model
from xuramamba.wavecore.checkpoint import WEIGHTS, save_model
from xuramamba.wavecore.export import export_model

LOOPS = {"fast": (12, 1e-3), "mid": (24, 5e-4), "slow": (32, 2e-4)}  # steps, learning rate
DEFAULTS = {"rlds_dir": None, "use_synthetic": True, "batch_size": 4, "obs_dim": 128, "action_dim": 32,
            "output_dim": 32, "metrics_path": None, "arch_preset": "pi5", "sparsity_lambda": 0.0, "seed": 0}
OPTIONS = ("checkpoint_dir", "export_dir", "quantization", "compact_export")


def settings_of(payload):
    """{loop: every setting}; ConfigError for unknown keys, and for loops of different sizes."""
    unknown = set(payload) - set(LOOPS) - set(OPTIONS)
    require(not unknown, f"unknown keys {sorted(unknown)}; expected {', '.join((*LOOPS, *OPTIONS))}")
    loops = {}
    for name, (steps, rate) in LOOPS.items():
        given = payload.get(name) or {}
        known = {**DEFAULTS, "max_steps": steps, "learning_rate": rate}
        wrong = set(given) - set(known)
        require(not wrong, f"{name}: unknown keys {sorted(wrong)}; expected {', '.join(known)}")
        loops[name] = {**known, **given}
    for key in ("arch_preset", "obs_dim", "action_dim", "output_dim"):
        values = {name: loop[key] for name, loop in loops.items()}
        require(len(set(values.values())) == 1, f"{key} differs between the loops: {values}; they train one model")
    return loops


def run(payload, folder):
    """Train one model through the three loops, write below ``folder``, and return the result for JSON.

    payload : {"fast" | "mid" | "slow": settings, "checkpoint_dir", "export_dir", "quantization", "compact_export"}.
    """
    loops, folder = settings_of(payload), Path(folder)
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    status = folder / "trainer" / "status.json"
    one = loops["slow"]
    config = CoreModelConfig.preset(one["arch_preset"])
    model, variables = make_core_model(one["seed"], one["obs_dim"], one["action_dim"], one["output_dim"], config)
    result, total = {}, 0
    try:
        for name, loop in loops.items():
            save_json(status, {"status": "running", "loop": name})
            data = _episodes(loop, folder / "synthetic")
            rows = trainer.train(model, variables["params"], data, steps=loop["max_steps"], batch=loop["batch_size"],
                                 length=16, lr=loop["learning_rate"], seed=loop["seed"],
                                 sparsity_lambda=loop["sparsity_lambda"])
            total += len(rows)
            path = Path(loop["metrics_path"] or folder / "trainer" / f"{name}_metrics.csv")
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, trainer.COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            result[name] = {
                "loop": name, "request": loop, "metrics_path": str(path), "checkpoint_dir": None,
                "checkpoint_step": None, "checkpoint_format": None,
                "result": {"steps": len(rows), "first_loss": rows[0]["loss"], "final_loss": rows[-1]["loss"]},
            }  # fmt: skip
        checkpoint = Path(payload.get("checkpoint_dir") or folder / "checkpoint")
        about = {"final_loss": rows[-1]["loss"], "rlds_episodes": len(data)}
        save_model(checkpoint, model, variables, about)
        result["slow"] |= {"checkpoint_dir": str(checkpoint), "checkpoint_step": total,
                           "checkpoint_format": Path(WEIGHTS).suffix[1:]}
        quantization = payload.get("quantization") or ("int8" if payload.get("compact_export") else None)
        export = Path(payload.get("export_dir") or folder / "export")
        result["export"] = export_model(export, model, variables, quantization, checkpoint_path=str(checkpoint),
                                        arch_preset=one["arch_preset"], sparsity_lambda=one["sparsity_lambda"])
    except Exception as error:
        save_json(status, {"status": "error", "message": str(error)})
        raise
    save_json(status, {"status": "ok", "steps": total})
    return {**result, "status": "ok"}


def _episodes(loop, folder):
    if loop["rlds_dir"]:
        return load_episodes(loop["rlds_dir"], loop["obs_dim"], loop["output_dim"])
    require(loop["use_synthetic"], "use_synthetic is false and no rlds_dir is given")
    if not folder.exists():
        simulate.generate(folder, 32, loop["seed"])
    return load_episodes(folder, loop["obs_dim"], loop["output_dim"])
