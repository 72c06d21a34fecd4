"""Phase 1: train predictor, Y-Encoder and gates to predict the embedding of the answer; the X-Encoder is frozen."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import options, parallel
from training.data import arguments
from training.data.captions import TEMPLATES
from training.data.dataset import Dataset
from training.phases import end_to_end, jepa, objective
from training.phases.common import FeatureStore, rows_at_once, some_tokens
from xuracore import no_grad
from xuracore.errors import ConfigError, FormatError
from xuravljepa.model import CAPTION_QUERY, SHIPPED, VLJEPA
from xuravljepa.predictor import POOLS
from xuravljepa.presets import VLJEPAConfig
from xuravljepa.vit import VisionTransformer
from xuravljepa.vit_names import FAMILIES

EPILOG = """\
Data: --data-dir, a manifest or one of the common formats (see training/README.md); or generated scenes with
questions and tool questions.  The X-Encoder: --vit DIR with weights of ours, timm's or Hugging Face's; else the
shipped tiny one.  With --train-encoder it learns too.

examples:
  python training/scripts/train_jepa.py --tiny --epochs 2 --batch-size 4
  python training/scripts/train_jepa.py --vit runs/vit/model --scenes 12000 --steps 6000
  python training/scripts/train_jepa.py --data-dir my/pictures --preset small --vit vit-small --epochs 10
"""
NUMBERS = tuple(str(n) for n in range(31))
LARGEST_CLOSED_SET = 20_000
# Adam's rate falls with the width (Yang et al. 2022, Tensor Programs V); memory grows with the batch.
LARGER = {"small": {"batch_size": 16, "lr": 5e-4}, "base": {"batch_size": 4, "lr": 2e-4}}


def own_data(args, for_monitor=False):
    """(training rows, validation rows, a BadRows) of --data-dir.

    for_monitor : rows of the split ``calib``, if there are any, in place of the validation rows.
    """
    data = arguments.open_from(args, args.output_dir if args._ranks.leads else None,
                               say=lambda text: options.say(args, text))
    rows = [row for row in data.rows if row.image is not None and (row.query and row.answer or row.caption)]
    if len(rows) < len(data.rows):
        options.say(args, f"{len(data.rows) - len(rows)} rows without a picture, or with nothing to say, are not used")
    held = [row for row in rows if row.split in ("val", "validation")]
    kept = [row for row in rows if row.split in (None, "train")]
    if not held:  # every tenth picture serves for validation
        pictures = sorted({str(row.image) for row in kept})
        chosen = set(pictures[::10])
        held = [row for row in kept if str(row.image) in chosen]
        kept = [row for row in kept if str(row.image) not in chosen]
    if for_monitor:
        held = [row for row in rows if row.split == "calib"] or held
    if not any(row.query for row in kept):  # captions alone: to tell which belongs to a picture is the measure
        held = [replace(row, query=CAPTION_QUERY, answer=row.caption, answers=(row.caption,)) for row in held]
    return kept, [row for row in held if row.query and row.answer], data.bad


def data_sets(args):
    """(training rows, validation rows, a BadRows, or None where they are generated)."""
    if args.data_dir:
        return own_data(args)
    scenes = args.scenes or (40 if args.tiny else 12000)
    options.say(args, f"no --data-dir: generating {scenes} scenes with questions (seed {args.data_seed})")
    how = {"templates": args.wordings}
    train = Dataset.scenes("train", scenes, args.data_seed, per_type=3, **how).rows
    tools = Dataset.tools("train", scenes, args.data_seed, pools=("known", "known", "train"), **how).rows
    texts = Dataset.captions("train", scenes, args.data_seed, types=tuple(TEMPLATES), **how).rows
    held = Dataset.scenes("val", min(scenes, 300), args.data_seed, **how).rows
    known = Dataset.tools("val", min(scenes, 300), args.data_seed, pools=("known",), **how).rows
    again = [row for row in train if row.type in getattr(args, "twice", ())]
    rows = [*train, *again, *tools, *(texts if args.wordings == "wide" else ())]
    only = getattr(args, "only", ())
    return [row for row in rows if not only or row.type in only], [*held, *known], None


def first_encoder(args, config, rng, before=None):
    """The X-Encoder at the start: --vit, or new for the sizes asked for, or that of the model ``before``, or the
    shipped tiny one, or random weights."""
    if args.vit:
        encoder = VisionTransformer.from_pretrained(args.vit)
        options.say(args, f"X-Encoder: {FAMILIES[encoder.family]}, {encoder.parameter_count():,} parameters, pictures "
                    f"of {encoder.preprocessing.size}; licence: {encoder.licence or 'not stated'}")
        return encoder.at_size(encoder.preprocessing.size)
    if args.image_size or args.patch_size:
        sizes = config.vision.replace(image_size=args.image_size or config.vision.image_size,
                                      patch_size=args.patch_size or config.vision.patch_size)
        return VisionTransformer(sizes, rng=rng)
    if before is not None:
        return before.x_encoder
    if args.preset == "tiny" and (SHIPPED / "tiny" / "model.safetensors").exists():
        options.say(args, "no --vit: using the X-Encoder of the shipped tiny model")
        return VLJEPA.from_pretrained("tiny").x_encoder
    if not args.train_encoder:
        options.say(args, "warning: no --vit: the X-Encoder has random weights and stays so; expect poor answers")
    return VisionTransformer(config.vision, rng=rng)


def objective_options(parser):
    """What is minimised, and how the Y-Encoder takes part."""
    group = parser.add_argument_group("objective")
    group.add_argument("--loss", choices=objective.LOSSES, default="nce",
                       help="nce: equal answers are one target (default); paired: as published; cosine, l1, l2 need a "
                       "Y-Encoder that stands still")
    group.add_argument("--target", choices=objective.TARGETS, help="what the predictor aims at: the Y-Encoder as it "
                       "learns (default), a frozen one (default for cosine, l1, l2), or its slow average")
    group.add_argument("--ema-tau", type=float, default=0.996, help="of the slow average at the start, rising to 1")
    group.add_argument("--temperature", type=float, help="start of the learned temperature (default 0.07; sigmoid 0.1)")
    group.add_argument("--uniformity", type=float, default=0.0, metavar="WEIGHT",
                       help="also spread the embeddings evenly; 0.01 to 0.1")
    group.add_argument("--prior-correct", action="store_true",
                       help="nce: learn how much likelier than usual an answer is, not how likely")
    group.add_argument("--negatives", choices=objective.NEGATIVES,
                       help="all known answers (default up to 512), a bank of them without gradient, or the batch's")
    group.add_argument("--bank-every", type=options.positive, metavar="STEPS",
                       help="encode the bank again so often (default 100); implies --negatives bank")
    group.add_argument("--y-encoder", metavar="DIR", help="take the Y-Encoder of this trained model; 'tiny' is shipped")
    group.add_argument("--y-encoder-lr-multiplier", type=float, default=1.0,
                       help="1 from scratch; 0.05 where the Y-Encoder was trained before; 0 freezes it")


def objective_config(args, answers, steps):
    """The ObjectiveConfig of the options; what they leave open follows from the loss and the number of answers."""
    target = args.target or ("frozen" if args.loss in objective.REGRESSIONS or not args.y_encoder_lr_multiplier
                             else "online")
    negatives = args.negatives or ("bank" if args.bank_every else "all" if answers <= 512 else
                                   "bank" if answers <= LARGEST_CLOSED_SET else "batch")
    if (args.negatives or args.bank_every) and args.loss not in ("nce", "sigmoid"):
        raise ConfigError("--negatives and --bank-every are for nce and sigmoid; "
                          f"--loss {args.loss} takes none but its batch's")
    if args.bank_every and negatives != "bank":
        raise ConfigError(f"--bank-every is for --negatives bank, not for {negatives}")
    if target != "frozen" and not args.y_encoder_lr_multiplier:
        raise ConfigError(f"--y-encoder-lr-multiplier 0 freezes the Y-Encoder, --target {target} lets it learn")
    if target == "frozen" and not (args.y_encoder or args.model):
        options.say(args, "warning: the Y-Encoder has random weights and stays so; with --y-encoder DIR it is a "
                    "trained one")
    return objective.ObjectiveConfig(args.loss, target, negatives, args.bank_every or 100, args.uniformity,
                                     args.prior_correct, args.ema_tau, steps)


def accuracy_by_type(model, rows, features, batch_size=None):
    """{type: accuracy} of the nearest known answer, with "all" over everything; told what a tool says."""
    model.forget_bank()
    answers = np.array(model.config.answers)
    hits, batch_size = {}, batch_size or rows_at_once(model)
    with no_grad():
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            told = [None if row.meta.get("known") else jepa.said_by_tool(row) for row in chosen]
            examples = [jepa.Example(row, row.answer, text) for row, text in zip(chosen, told)]
            batch = jepa.collate(model, examples, features)
            embedding = model.predictor(batch["query"], batch["visual"], batch["tool"]).embedding
            said = answers[model.similarities(embedding).argmax(axis=1)]
            for row, text in zip(chosen, said):
                for name in (row.type or "untyped", "all"):
                    hits.setdefault(name, []).append(text == row.answer)
    return {name: float(np.mean(values)) for name, values in sorted(hits.items())}


def closed_set(train_rows, held_rows, generated):
    """The answers that the model will choose from: all of them, or where those are too many, those held out."""
    answers = {row.answer for row in [*train_rows, *held_rows]} - {None}
    if len(answers) > LARGEST_CLOSED_SET:
        answers = {row.answer for row in watched(held_rows)}
    return tuple(sorted(answers | set(NUMBERS if generated else ())))


def watched(held_rows):
    """About three thousand of the rows held out, which say how the training goes.  FormatError without any."""
    if not held_rows:
        raise FormatError("there are too few usable pictures to hold some out for validation")
    return held_rows[:: max(1, len(held_rows) // 3000)]


def encoder_options(parser):
    """What the X-Encoder is, and whether it learns."""
    group = parser.add_argument_group("X-Encoder")
    group.add_argument("--vit", "--vit-checkpoint", metavar="DIR", help="folder of the X-Encoder's weights")
    arguments.add_cache_option(group)
    group.add_argument("--train-encoder", action="store_true", help="it learns too, for small pictures of your own")
    group.add_argument("--image-size", type=options.positive, metavar="PIXELS",
                       help="side of the pictures for a new one")
    group.add_argument("--patch-size", type=options.positive, metavar="PIXELS", help="side of its patches")
    group.add_argument("--augment", type=float, default=0.0, metavar="STRENGTH", help="turn, scale and shift the "
                       "pictures while training; 1: by up to 12 degrees, a tenth, an eighth of the side (default 0)")


def check_encoder_options(args):
    """ConfigError for options of the X-Encoder that exclude each other."""
    for name in ("image_size", "patch_size", "augment"):
        if getattr(args, name) and not args.train_encoder:
            raise ConfigError(f"--{name.replace('_', '-')} is for an X-Encoder that learns: add --train-encoder")
    if args.train_encoder and args.feature_cache not in (None, "none"):
        raise ConfigError("--feature-cache keeps what a frozen X-Encoder sees; with --train-encoder it changes")
    if args.vit and (args.image_size or args.patch_size):
        raise ConfigError("--vit brings its own sizes; --image-size and --patch-size are for a new X-Encoder")


@parallel.together
def main(argv=None):
    parser = options.training_parser(__doc__, EPILOG, steps=5000, batch_size=32, lr=2e-3, warmup=200,
                                     weight_decay=0.02, output_dir="runs/jepa", monitor="all", presets=LARGER)
    parser.add_argument("--turns", type=options.positive, default=8, metavar="N",
                        help="questions per picture in one sequence (default 8)")
    parser.add_argument("--lesson", type=int, metavar="BATCHES",
                        help="begin with so many batches of the simplest generated questions (default 600; none with "
                        "--tiny or --data-dir)")
    parser.add_argument("--angn-reg-weight", type=float, default=0.01, help="pull of the gates towards open")
    parser.add_argument("--model", metavar="DIR", help="go on from this model's weights; 'tiny' is the shipped one")
    parser.add_argument("--wordings", choices=("plain", "wide"), default="wide", help="how generated questions are "
                        "put: in a few ways each, or in hundreds, and captions too (default)")
    parser.add_argument("--twice", nargs="*", default=(), metavar="TYPE",
                        help="types of generated questions that come twice as often, such as left_of")
    parser.add_argument("--only", nargs="*", default=(), metavar="TYPE", help="train on these types of generated "
                        "questions alone, as a lesson; all are still measured")
    parser.add_argument("--typos", type=float, default=0.05, metavar="SHARE",
                        help="of the questions with one slip of the pen (default 0.05)")
    parser.add_argument("--bidirectional", action="store_true", help="a predictor whose layers read both ways: dearer, "
                        "and no tool's result can be written into its states, only read")
    parser.add_argument("--pool", choices=POOLS, help="the answer is the mean of the READ tokens (default), or of "
                        "these and the question's words")
    objective_options(parser)
    encoder_options(parser)
    arguments.add_data_options(parser)
    args = parser.parse_args(argv)
    options.prepare(args)
    check_encoder_options(args)
    rng = np.random.default_rng(args.seed + 1)
    train_rows, held_rows, bad = data_sets(args)
    watched(held_rows)  # there are some
    generated = bad is None
    answers = closed_set(train_rows, held_rows, generated)
    before = VLJEPA.from_pretrained(args.model) if args.model else None
    config = before.config if before else VLJEPAConfig.preset(args.preset)
    reading = {"bidirectional": args.bidirectional or config.predictor.bidirectional,
               "pool": args.pool or config.predictor.pool}
    config = config.replace(predictor=config.predictor.replace(**reading))
    encoder = first_encoder(args, config, rng, before)
    if args.train_encoder:  # the patches that stand out are not known yet: all are read
        config = config.replace(predictor=config.predictor.replace(n_salient=0))
    if (encoder.config, encoder.preprocessing) != (config.vision, config.preprocessing):
        config = config.with_encoder(encoder)
    model = VLJEPA(config.replace(answers=answers), rng=rng)
    model.x_encoder.load_state_dict(encoder.state_dict())
    del encoder  # of the largest preset a gigabyte
    if args.y_encoder:
        model.y_encoder.load_state_dict(VLJEPA.from_pretrained(args.y_encoder).y_encoder.state_dict())
    start = args.temperature or (math.exp(-objective.SIGMOID_START[0]) if args.loss == "sigmoid" else 0.07)
    model.log_scale.data[...] = -np.log(start)
    if before:
        model.load_state_dict(before.state_dict())
    model.requires_grad_(False)

    if options.dry_run(args, phase=1, questions=len(train_rows), held_out=len(held_rows), answers=len(answers)):
        return 0
    if bad is not None:
        train_rows, held_rows = arguments.leave_out_long(model, bad, train_rows, held_rows)
    if args.train_encoder:
        pictures = end_to_end.PixelStore(model, [*train_rows, *held_rows], bad)
        seen, answer_loss = pictures.tokens_of(model), end_to_end.answer_loss(args.angn_reg_weight)
    else:
        pictures = seen = FeatureStore(model, [*train_rows, *held_rows], bad=bad,
                                       cache=arguments.cache_folder(args, model.x_encoder),
                                       report=options.counter(args, "pictures encoded"), ranks=args._ranks)
        answer_loss = jepa.answer_loss(args.angn_reg_weight)
        if not args.model:
            model.predictor.fit_vision(some_tokens(pictures.tokens))
    if bad is not None:
        train_rows, held_rows = pictures.usable(train_rows), pictures.usable(held_rows)
        arguments.report_bad(bad, args.output_dir if args._ranks.leads else None, args.quiet)
    held = watched(held_rows)
    distinct = len({row.answer for row in train_rows} | set(answers))
    if bad is not None:
        answers = closed_set(train_rows, held_rows, generated)
        model.config = model.config.replace(answers=answers)
    lesson = args.lesson if args.lesson is not None else 600 if generated and not args.tiny else 0
    batches = jepa.QuestionBatches(model, train_rows, pictures, options.whole_batch(args), args.seed, args.turns,
                                   lesson, typos=args.typos, ranks=args._ranks)
    if args.augment:
        batches = end_to_end.MovedBatches(batches, args.augment, options.whole_batch(args), args.seed, args._ranks)
    steps = max(1, args.epochs * len(batches) // args.accumulate) if args.epochs else args.steps
    steps = steps or args._defaults["steps"]
    settings = objective_config(args, distinct, steps)
    written = any(row.answer is None for row in train_rows)
    learns = {"predictor": True, "log_scale": True, "y_encoder": settings.target != "frozen", "y_decoder": written,
              "x_encoder": args.train_encoder}
    for name in (name for name, wanted in learns.items() if wanted):
        getattr(model, name).requires_grad_()
    training = objective.Training(model, objective.Objective(settings, model, [jepa.target(row) for row in train_rows],
                                                                   args._ranks))
    options.say(args, f"phase 1: {model.parameter_count(trainable_only=True):,} trained parameters, "
                f"{len(train_rows):,} questions about {len(pictures):,} pictures, {len(answers)} answers")
    result, trainer = options.train(
        training, answer_loss, batches, args, steps=steps,
        lr_scales={"model.y_encoder": args.y_encoder_lr_multiplier},
        evaluate=lambda t, step: accuracy_by_type(t.model, held, seen), after_step=lambda t: t.after_step(),
        describe={"phase": 1, "model": model.config.to_dict(), "rows": len(train_rows),
                  "batch_size": options.whole_batch(args), "data_seed": args.data_seed,
                  "objective": settings.to_dict(),
                  **({"train_encoder": True, "augment": args.augment} if args.train_encoder else {})},
    )
    if result.complete:
        options.finish(args, trainer, model, lambda: accuracy_by_type(model, held, seen))
    return result.exit_code


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
