"""Phase 3: train the agent's heads (injector, tool selector, monitor); the model is frozen."""

import json
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import options, parallel
from training.data import arguments
from training.data.captions import TEMPLATES
from training.data.dataset import Dataset
from training.data.memory_data import memory_rows
from training.data.scenes import CORRUPTIONS
from training.data.strange import TAUGHT
from training.data.tools_data import write_price_list
from training.phases import agent as phase
from training.phases import agent_own as own
from training.phases import monitor as judging
from training.phases.common import FeatureStore, some_tokens
from training.scripts.train_jepa import own_data
from xuracore import io, no_grad
from xuracore.errors import ConfigError
from xuravljepa.agent.agent import save_heads
from xuravljepa.agent.confusion import words_of
from xuravljepa.agent.heads import AgentConfig, AgentHeads
from xuravljepa.agent.injector import MODES
from xuravljepa.agent.recall import register_search
from xuravljepa.agent.scene_tools import register_scene_tools
from xuravljepa.agent.builtin import KnowledgeBase
from xuravljepa.agent.tools import ToolRegistry
from xuravljepa.feature_cache import FeatureCache
from xuravljepa.model import CAPTION_QUERY, SHIPPED, VLJEPA

EPILOG = """\
Stage 1 trains the injector on the difference that reading a tool's text makes, and the tool selector.
Stage 2 trains the monitor on the model's answers to questions it was not trained on ("calib" scenes and keys,
and keys made up for it), before and after an injection, through corruptions and on pictures that are no
scenes; the pictures of a third of those are kept back to calibrate it.

examples:
  python training/scripts/train_agent.py --tiny --steps 40
  python training/scripts/train_agent.py --model runs/decoder/model --steps 1000
  python training/scripts/train_agent.py --model runs/decoder/model --injection-mode residual   the earlier design
"""


def tool_cards():
    """{tool: its description}, from the tools' own registration."""
    registry = ToolRegistry()
    register_scene_tools(registry, KnowledgeBase({"shop": {"circle": 1}}))
    register_search(registry)
    return {tool.name: tool.description for tool in registry}


def taught_words(seed, scenes=1000):
    """What the questions of phase 1 are made of; names of shops that it did not teach are not among them."""
    wide = {"templates": "wide"}
    rows = [*Dataset.scenes("train", scenes, seed, **wide).rows,
            *Dataset.tools("train", scenes, seed, pools=("known",), **wide).rows,
            *Dataset.captions("train", scenes, seed, types=tuple(TEMPLATES), **wide).rows,
            *memory_rows("train", scenes // 3, seed)]
    return words_of(row.query for row in rows)


def generated_questions(args, scenes):
    """{name: Group} about ``calib`` scenes."""
    def plain(start, count, templates="plain"):
        return Dataset.scenes("calib", count, args.data_seed, start=start, templates=templates).rows

    def tools(start, count, templates="plain"):
        return Dataset.tools("calib", count, args.data_seed, start=start, pools=("known", "calib"),
                             templates=templates).rows

    half = scenes // 2
    asked = {"scenes": [*plain(0, scenes - half), *plain(scenes - half, half, "wide")]}
    for number, kind in enumerate(CORRUPTIONS):
        start, count = scenes + number * scenes // 10, max(scenes // 10, 1)
        asked[kind] = judging.corrupted([*plain(start, count), *tools(start, count)], kind)
    asked["tools"] = [*tools(0, scenes - half), *tools(scenes - half, half, "wide"),
                      *judging.with_new_keys(tools(scenes, scenes), args.data_seed),
                      *judging.with_new_keys(tools(2 * scenes, half, "wide"), args.data_seed)]
    asked["memory"] = memory_rows("calib", max(scenes // 3, 3), args.data_seed)
    for number, kind in enumerate(TAUGHT, start=len(CORRUPTIONS)):
        asked[kind] = plain(scenes + number * scenes // 10, max(scenes // 20, 1))
    return {group: own.Group(rows, judging.changes(group, args.data_seed) if group in TAUGHT else None)
            for group, rows in asked.items()}


def monitor_readings(model, heads, args, asked, number, strange):
    """(Readings of all groups, {group: what gather_readings found, and its rows}).

    asked : {name: Group}, the first group as it is.   number : of the picture of a row.   strange : how many
    pictures of something else are added.
    """
    found, parts, shift = {}, [], heads.monitor.config.shift
    cache = args._cache and FeatureCache(args._cache, model.x_encoder, model.config.preprocessing)
    for group, (rows, change) in asked.items():
        store = judging.ViewStore(model, shift, rows, change=change, cache=cache,
                                  report=options.counter(args, f"pictures encoded ({group})") if cache else None)
        found[group] = judging.gather_readings(model, heads, rows, store,
                                               report=options.counter(args, f"questions read ({group})"))
        parts.append(judging.Readings.of(found[group], rows, group, number))
        found[group]["rows"] = rows
    first = next(iter(asked.values())).rows
    strange = judging.strange_readings(model, heads, first, strange, args.data_seed)
    parts.append(judging.Readings(strange, np.ones(len(strange), np.int64), np.full(len(strange), "strange", object),
                                  np.arange(len(strange))))
    return judging.Readings.joined(parts), found


def generated_rows(args, scenes):
    """(tool rows, plain rows, and both held out) of stage 1."""
    half, wide = scenes // 2, {"templates": "wide"}
    tool_rows = [*Dataset.tools("train", scenes - half, args.data_seed, pools=("train", "known")).rows,
                 *Dataset.tools("train", half, args.data_seed, scenes - half, pools=("train", "known"), **wide).rows,
                 *memory_rows("train", scenes // 3, args.data_seed)]
    plain_rows = [*Dataset.scenes("train", scenes // 8, args.data_seed).rows,
                  *Dataset.scenes("train", scenes // 8, args.data_seed, scenes // 8, **wide).rows]
    held_rows = [*Dataset.tools("val", max(scenes // 12, 8), args.data_seed, pools=("train", "calib")).rows,
                 *memory_rows("val", max(scenes // 36, 3), args.data_seed)]
    return tool_rows, plain_rows, held_rows, Dataset.scenes("val", max(scenes // 48, 4), args.data_seed).rows


def train_heads(args, model, heads, cards, batches, held, description):
    """Stage 1: injector and selector.  (metrics, None), or (None, the exit code) where it was ended early."""
    objective = phase.injection_objective(model, cards, args.injection_weight)
    options.say(args, f"phase 3, stage 1: injector and selector, {heads.injector.parameter_count():,} and "
                f"{heads.selector.parameter_count():,} parameters")
    heads.monitor.requires_grad_(False)

    def evaluate(heads, step):
        found = [objective(heads, held.batch(i))[1] for i in range(4)]
        return {name: float(np.mean([values[name] for values in found])) for name in found[0]}

    result, trainer = options.train(heads, objective, batches, args, evaluate=evaluate,
                                    output_dir=Path(args.output_dir) / "injection",
                                    describe={**description, "stage": 1})
    if not result.complete:
        return None, result.exit_code
    trainer.adopt()
    return evaluate(heads, result.step), None


def train_monitor(args, heads, readings, description):
    """Stage 2 but for the calibration.  (readings kept back for that, None), or (None, the exit code)."""
    held = judging.held_back(readings)
    fitting, kept = readings[~held], readings[held]
    if args.data_dir and (warning := own.check_enough(fitting, kept)):
        options.say(args, f"warning: {warning}")
    heads.monitor.fit_scale(fitting.features)
    heads.requires_grad_(False)
    heads.monitor.requires_grad_()
    options.say(args, f"phase 3, stage 2: monitor, {heads.monitor.parameter_count():,} parameters, "
                f"{len(fitting.wrong):,} readings, {fitting.wrong.mean():.1%} wrong")
    batches = judging.ReadingBatches(fitting, 512, heads.config.monitor.hidden, args.seed)
    args.weight_decay = judging.WEIGHT_DECAY
    result, trainer = options.train(heads, judging.monitor_objective, batches, args, steps=args.monitor_steps,
                                    output_dir=Path(args.output_dir) / "monitor", describe={**description, "stage": 2})
    if not result.complete:
        return None, result.exit_code
    trainer.adopt()
    return kept[kept.group != "strange"], None


def own_rows(args, model, source):
    """(rows taught, rows held out, their pictures' FeatureStore) of --data-dir."""
    taught, held, bad = own_data(args, for_monitor=True)
    arguments.check_known(model, source, held, given=True)
    if args.dry_run:
        return taught, held, None
    taught, held = arguments.leave_out_long(model, bad, taught, held)
    known = taught if own.tool_names(taught) else taught[:: max(1, len(taught) // 2000)]
    features = FeatureStore(model, [*known, *held], report=options.counter(args, "pictures encoded"), bad=bad,
                            cache=args._cache, ranks=args._ranks)
    arguments.report_bad(bad, args.output_dir if args._ranks.leads else None, args.quiet)
    return features.usable(taught), features.usable(held), features


@parallel.together
def main(argv=None):
    parser = options.training_parser(__doc__, EPILOG, steps=1000, batch_size=32, lr=4e-3, warmup=100,
                                     weight_decay=0.01, output_dir="runs/agent")
    parser.add_argument("--model", "--phase2-checkpoint", default=None, metavar="DIR",
                        help="folder of the model that phase 2 wrote (default runs/decoder/model)")
    parser.add_argument("--injection-mode", choices=MODES[:-1], default="state",
                        help="how a result is taken in (default state); the shipped heads write into the states")
    parser.add_argument("--injection-weight", type=float, default=4.0,
                        help="of the unexplained state difference, beside the answer's cross-entropy (default 4)")
    parser.add_argument("--monitor-steps", type=options.positive, default=1500)
    parser.add_argument("--monitor-scenes", type=options.positive, metavar="N",
                        help="pictures that stage 2 asks about, a tenth as many of each corruption (default 3000)")
    parser.add_argument("--stage", choices=("all", "injection"), default="all",
                        help="'injection' stops after stage 1, to compare the modes")
    arguments.add_cache_option(parser)
    arguments.add_data_options(parser)
    args = parser.parse_args(argv)
    options.prepare(args)
    source = args.model or ("tiny" if args.tiny and (SHIPPED / "tiny").exists() else "runs/decoder/model")
    model = VLJEPA.from_pretrained(source)
    model.requires_grad_(False)
    output, report, args._cache = Path(args.output_dir), {}, None
    if not args.dry_run:
        args._cache = arguments.cache_folder(args, model.x_encoder)
    if args.data_dir:
        taught, held, features = own_rows(args, model, source)
        cards = own.tool_names(taught)
        if args.stage == "injection" and not cards:
            raise ConfigError("--stage injection trains what takes in a tool's result, and no row of --data-dir names "
                              "a tool with its result")
    else:
        cards = tool_cards()
    config = AgentConfig.for_model(model.config, tuple(cards), args.injection_mode).replace(cards=cards)
    shift = own.shift_for(model.config.vision.image_size)
    config = config.replace(monitor=config.monitor.replace(shift=shift))
    heads = AgentHeads(config, model.config.predictor, rng=np.random.default_rng(args.seed + 3))
    if options.dry_run(args, phase=3, model=str(source), monitor_steps=args.monitor_steps,
                       **({"questions": len(held), "tools": list(cards)} if args.data_dir else {})):
        return 0
    description = {"phase": 3, "heads": config.to_dict(), "batch_size": options.whole_batch(args),
                   "data_seed": args.data_seed}

    # ------------------------------------------------------------------ stage 1
    rumours = None
    if args.data_dir:
        parts = [part for rows in (taught, held) for part in own.questions(rows, model.config.answers, cards)]
        rumours = own.rumours([*parts[0], *parts[2]])
        if cards:
            own.check_tools(parts[0], parts[2])
    else:
        scenes = args.scenes or (40 if args.tiny else 3000)
        options.say(args, f"no --data-dir: generating {scenes} scenes with questions and tool questions (seed "
                    f"{args.data_seed})")
        parts = generated_rows(args, scenes)
        arguments.check_known(model, source, parts[0], given=False)
        features = FeatureStore(model, [row for part in parts for row in part], cache=args._cache,
                                report=options.counter(args, "pictures encoded"))
    heads.monitor.familiarity.fit(some_tokens(features.tokens).astype(np.float32))
    tool_rows, plain_rows, held_rows, held_plain = parts
    if cards:
        batches = phase.InjectionBatches(model, tool_rows, plain_rows, features, options.whole_batch(args), args.seed,
                                         ranks=args._ranks, rumours=rumours)
        held_batches = phase.InjectionBatches(model, held_rows, held_plain, features, 64, args.seed + 1,
                                              rumours=rumours)
        report["injection"], code = train_heads(args, model, heads, cards, batches, held_batches, description)
        if code is not None:
            return code
    else:
        options.say(args, "no row names a tool with its result: there is no stage 1, and the agent will have no tools; "
                    "it says where it doubts")
    if args.stage == "injection":
        if args._ranks.leads:
            save_heads(heads, output)  # for evaluate.py --heads
            io.save_json(output / "metrics.json", report)
            print(json.dumps(report))
        return 0

    # ------------------------------------------------------------------ stage 2
    if args.data_dir:
        asked, number = own.asked_of(held, model.config.preprocessing, args.data_seed), own.picture_number(held)
        strange = max(len({number(row) for row in held}) // 2, 8)
    else:
        scenes = args.monitor_scenes or (24 if args.tiny else 3000)
        asked, number, strange = generated_questions(args, scenes), lambda row: row.image.index, max(scenes // 2, 3)
    readings, found = monitor_readings(model, heads, args, asked, number, strange)
    kept, code = train_monitor(args, heads, readings, description)
    if code is not None:
        return code
    if not args._ranks.leads:
        return 0
    if args.data_dir:
        report["kept"] = own.keep_the_better(heads.monitor, kept)
    else:
        with no_grad():
            heads.monitor.calibrate(heads.monitor(kept.features).data, kept.wrong)
    heads.monitor.fit_limit(readings[readings.group != "strange"].features)
    fixes, breaks = 0.0, 0.0
    if "tools" in found:
        fixes, breaks = judging.usefulness(judging.sayable(model, found["tools"], found["tools"]["rows"]))
    report["monitor"] = {"temperature": float(heads.monitor.temperature), "offset": float(heads.monitor.offset),
                         "fixes": fixes, "breaks": breaks, **judging.judged(heads.monitor, kept)}
    words = words_of(row.query or CAPTION_QUERY for row in taught) if args.data_dir else taught_words(args.data_seed)
    heads.config = config.replace(fixes=fixes, breaks=breaks, words=words)
    model.save_pretrained(output / "model")
    save_heads(heads, output / "model")
    if not args.data_dir:
        write_price_list(output / "model" / "prices.json", args.data_seed)
    io.save_json(output / "metrics.json", report)
    options.say(args, f"saved {output}/model")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
