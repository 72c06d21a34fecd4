"""Phase 3: train the agent's heads (injector, tool selector, monitor); the model is frozen."""

import json
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import metrics, options, parallel
from training.data.dataset import Dataset
from training.data.tools_data import write_price_list
from training.phases import agent as phase
from training.phases.common import FeatureStore
from xuracore import io, no_grad
from xuracore.errors import ConfigError
from xuravljepa.agent.agent import save_heads
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.scene_tools import register_scene_tools
from xuravljepa.agent.builtin import KnowledgeBase
from xuravljepa.agent.tools import ToolRegistry
from xuravljepa.model import SHIPPED, VLJEPA

EPILOG = """\
Stage 1 trains the injector on the difference that reading a tool's text makes, and the tool selector.
Stage 2 trains the monitor on the model's answers to questions it was not trained on ("calib" scenes and
keys), before and after an injection, on corrupted pictures and on pictures that are no scenes; a second
part of those sets its temperature.

examples:
  python training/scripts/train_agent.py --tiny --steps 40
  python training/scripts/train_agent.py --model runs/decoder/model --steps 1000
  python training/scripts/train_agent.py --model runs/decoder/model --injection-mode residual   the earlier design
"""


UNTESTED = 100_000  # corrupted scenes from this number on: evaluation never gets so far


def tool_cards():
    """{tool: its description}, from the tools' own registration."""
    registry = ToolRegistry()
    register_scene_tools(registry, KnowledgeBase({"shop": {"circle": 1}}))
    return {tool.name: tool.description for tool in registry}


def monitor_readings(model, heads, args, scenes, split, start):
    """Readings of plain and tool questions about scenes of a split, and the rows they belong to."""
    plain = Dataset.scenes(split, scenes, args.data_seed, start=start).rows
    plain = plain[:: max(1, len(plain) // (6 * scenes))]  # about six questions a scene
    tools = Dataset.tools(split, scenes, args.data_seed, start=start, pools=("known", "calib")).rows
    rows = [*plain, *tools]
    features = FeatureStore(model, rows, report=options.counter(args, f"{split} pictures encoded"))
    found = phase.gather_readings(model, heads, rows, features,
                                  report=options.counter(args, f"{split} questions read"))
    return {**found, "rows": rows}


@parallel.together
def main(argv=None):
    parser = options.training_parser(__doc__, EPILOG, steps=1000, batch_size=32, lr=4e-3, warmup=100,
                                     weight_decay=0.01, output_dir="runs/agent")
    parser.add_argument("--model", "--phase2-checkpoint", default=None, metavar="DIR",
                        help="folder of the model that phase 2 wrote (default runs/decoder/model)")
    parser.add_argument("--injection-mode", choices=("state", "residual"), default="state")
    parser.add_argument("--injection-weight", type=float, default=4.0,
                        help="of the unexplained state difference, beside the answer's cross-entropy (default 4)")
    parser.add_argument("--monitor-steps", type=options.positive, default=1500)
    parser.add_argument("--stage", choices=("all", "injection"), default="all",
                        help="'injection' stops after stage 1, to compare the modes; the residual mode always does")
    args = parser.parse_args(argv)
    options.prepare(args)
    if args.data_dir:
        raise ConfigError("phase 3 needs tool questions with known answers, which only the generator has")
    source = args.model or ("tiny" if args.tiny and (SHIPPED / "tiny").exists() else "runs/decoder/model")
    model = VLJEPA.from_pretrained(source)
    model.requires_grad_(False)
    cards = tool_cards()
    config = AgentConfig.for_model(model.config, tuple(cards), args.injection_mode).replace(cards=cards)
    heads = AgentHeads(config, model.config.predictor, rng=np.random.default_rng(args.seed + 3))
    output = Path(args.output_dir)
    if options.dry_run(args, phase=3, model=str(source), monitor_steps=args.monitor_steps):
        return 0
    description = {"phase": 3, "heads": config.to_dict(), "batch_size": options.whole_batch(args),
                   "data_seed": args.data_seed}

    # ------------------------------------------------------------------ stage 1
    scenes = args.scenes or (40 if args.tiny else 3000)
    tool_rows = Dataset.tools("train", scenes, args.data_seed, pools=("train", "known")).rows
    plain_rows = Dataset.scenes("train", scenes // 4, args.data_seed).rows
    held_rows = Dataset.tools("val", max(scenes // 12, 8), args.data_seed, pools=("train", "calib")).rows
    held_plain = Dataset.scenes("val", max(scenes // 48, 4), args.data_seed).rows
    features = FeatureStore(model, [*tool_rows, *plain_rows, *held_rows, *held_plain],
                            report=options.counter(args, "pictures encoded"))
    heads.monitor.familiarity.fit(features.tokens[:2000].astype(np.float32))
    batches = phase.InjectionBatches(model, tool_rows, plain_rows, features, options.whole_batch(args), args.seed,
                                     ranks=args._ranks)
    held = phase.InjectionBatches(model, held_rows, held_plain, features, 64, args.seed + 1)
    objective = phase.injection_objective(model, cards, args.injection_weight)
    options.say(args, f"phase 3, stage 1: injector and selector, {heads.injector.parameter_count():,} and "
                f"{heads.selector.parameter_count():,} parameters")
    heads.monitor.requires_grad_(False)

    def evaluate(heads, step):
        found = [objective(heads, held.batch(i))[1] for i in range(4)]
        return {name: float(np.mean([values[name] for values in found])) for name in found[0]}

    result, trainer = options.train(heads, objective, batches, args, evaluate=evaluate,
                                    output_dir=output / "injection", describe={**description, "stage": 1})
    if not result.complete:
        return result.exit_code
    trainer.adopt()
    report = {"injection": evaluate(heads, result.step)}
    if args.stage == "injection" or args.injection_mode == "residual":
        if args._ranks.leads:
            save_heads(heads, output)  # for evaluate.py --heads
            io.save_json(output / "metrics.json", report)
            print(json.dumps(report))
        return 0

    # ------------------------------------------------------------------ stage 2
    scenes = 24 if args.tiny else 1500
    parts = [monitor_readings(model, heads, args, scenes, "calib", 0),
             monitor_readings(model, heads, args, scenes // 3, "corrupt", UNTESTED)]
    strange = phase.strange_readings(model, heads, parts[0]["rows"], scenes, args.data_seed)
    inputs = np.concatenate([*(part["features"] for part in parts), strange])
    wrong = np.concatenate([*(part["wrong"] for part in parts), np.ones(len(strange), np.int64)])
    # a picture belongs to one part only: its number decides
    picture = [[part["rows"][i].image.index for i in part["row"]] for part in parts]
    fitting = np.concatenate([*picture, np.arange(len(strange))]) % 3 != 0
    heads.monitor.fit_scale(inputs[fitting])
    heads.requires_grad_(False)
    heads.monitor.requires_grad_()
    options.say(args, f"phase 3, stage 2: monitor, {heads.monitor.parameter_count():,} parameters, "
                f"{fitting.sum():,} readings, {wrong[fitting].mean():.1%} wrong")
    readings = phase.ReadingBatches(inputs[fitting], wrong[fitting], 256, args.seed, args._ranks)
    result, trainer = options.train(heads, phase.monitor_objective, readings, args, steps=args.monitor_steps,
                                    output_dir=output / "monitor", describe={**description, "stage": 2})
    if not result.complete:
        return result.exit_code
    trainer.adopt()
    if not args._ranks.leads:
        return 0
    with no_grad():
        logits = heads.monitor(inputs[~fitting]).data
    heads.monitor.calibrate(logits, wrong[~fitting])
    heads.monitor.fit_limit(np.concatenate([part["features"] for part in parts]))  # scenes, strange ones left out
    p = heads.monitor.p_wrong(inputs[~fitting])
    fixes, breaks = phase.usefulness(parts[0])
    report["monitor"] = {"auroc": metrics.auroc(p, wrong[~fitting]), "temperature": float(heads.monitor.temperature),
                         "fixes": fixes, "breaks": breaks}
    heads.config = config.replace(fixes=fixes, breaks=breaks)
    model.save_pretrained(output / "model")
    save_heads(heads, output / "model")
    write_price_list(output / "model" / "prices.json", args.data_seed)
    io.save_json(output / "metrics.json", report)
    options.say(args, f"saved {output}/model")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
