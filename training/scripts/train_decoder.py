"""Phase 2: train the Y-Decoder to put embeddings into words; everything else is frozen."""

import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from training import options, parallel
from training.data import arguments
from training.data.captions import TEMPLATES
from training.data.dataset import Dataset
from training.phases import decoder
from training.phases.common import FeatureStore
from training.scripts.train_jepa import data_sets
from xuravljepa.model import SHIPPED, VLJEPA

EPILOG = """\
The decoder sees a mixture of the targets' and the predictor's embeddings of right answers, because at
inference it sees predictions; and it learns to look at the picture, because an embedding does not hold the order of
what a caption names.

examples:
  python training/scripts/train_decoder.py --tiny --steps 50
  python training/scripts/train_decoder.py --model runs/jepa/model --scenes 600 --steps 1000
"""
WHOLE = ("caption", "caption_down")


@parallel.together
def main(argv=None):
    parser = options.training_parser(__doc__, EPILOG, steps=1000, batch_size=64, lr=2e-3, warmup=100,
                                     weight_decay=0.01, output_dir="runs/decoder", monitor="exact_match")
    parser.add_argument("--model", "--phase1-checkpoint", default=None, metavar="DIR",
                        help="folder of the model that phase 1 wrote (default runs/jepa/model; with --tiny the "
                        "shipped model)")
    parser.add_argument("--wordings", choices=("plain", "wide"), default="wide", help="as in phase 1; wide (default) "
                        "holds captions, which the decoder then learns to write")
    parser.add_argument("--caption-scenes", type=options.positive, default=0, metavar="N",
                        help="whole captions of so many generated scenes more (default 0, with --wordings wide)")
    parser.add_argument("--lesson", type=int, default=0, metavar="BATCHES", help="begin with so many batches in which "
                        "captions are cut short, ever later (default 0)")
    parser.add_argument("--blind", action="store_true", help="a decoder that does not look at the picture stays so: "
                        "it is smaller, and writes from the embedding alone")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    arguments.add_cache_option(parser)
    arguments.add_data_options(parser)
    args = parser.parse_args(argv)
    options.prepare(args)
    source = args.model or ("tiny" if args.tiny and (SHIPPED / "tiny").exists() else "runs/jepa/model")
    model = VLJEPA.from_pretrained(source)
    if not args.blind:
        model = model.looking(np.random.default_rng(args.seed + 2))
    args.scenes = args.scenes or (40 if args.tiny else 600)
    train_rows, held_rows, bad = data_sets(args)
    if bad is None and args.wordings == "wide":
        train_rows += Dataset.captions("train", args.caption_scenes, args.data_seed, args.scenes, WHOLE, "wide").rows
    arguments.check_known(model, source, held_rows, given=bad is not None)
    if options.dry_run(args, phase=2, model=str(source), questions=len(train_rows), held_out=len(held_rows)):
        return 0
    if bad is not None:
        train_rows, held_rows = arguments.leave_out_long(model, bad, train_rows, held_rows)
    cache = arguments.cache_folder(args, model.x_encoder)
    features = FeatureStore(model, [*train_rows, *held_rows], report=options.counter(args, "pictures encoded"), bad=bad,
                            ranks=args._ranks, cache=cache)
    if bad is not None:
        train_rows, held_rows = features.usable(train_rows), features.usable(held_rows)
        arguments.report_bad(bad, args.output_dir if args._ranks.leads else None, args.quiet)
    options.say(args, f"predicting the answers of {len(train_rows):,} questions")
    predict = parallel.shared(lambda rows: decoder.predict(model, rows, features, tool=True), args._ranks)
    predicted = predict(train_rows)
    batches = decoder.AnswerBatches(model, train_rows, predicted, options.whole_batch(args), args.seed,
                                    ranks=args._ranks, features=features, lesson=args.lesson)
    model.requires_grad_(False)
    model.y_decoder.requires_grad_()
    options.say(args, f"phase 2: {model.parameter_count(trainable_only=True):,} trained parameters")
    held = held_rows[:: max(1, len(held_rows) // 300)]
    told = bad is not None  # nobody knows by heart what a user's tools say
    held_predicted = decoder.predict(model, held, features, tool=told)
    texts = ()
    if not args.data_dir and args.wordings == "wide":
        texts = Dataset.captions("val", min(args.scenes, 60), args.data_seed, types=tuple(TEMPLATES),
                                 templates="wide").rows
        texts_features = FeatureStore(model, texts, cache=cache)
        texts_predicted = decoder.predict(model, texts, texts_features)

    def evaluate(model, step):
        free = decoder.exact_match(model, held, held_predicted)
        constrained = decoder.exact_match(model, held, held_predicted, constrained=True)
        hits = model.similarities(held_predicted).argmax(axis=1)
        nearest = [model.config.answers[i] == row.answer for i, row in zip(hits, held)]
        captions = decoder.caption_report(model, texts, texts_predicted, texts_features) if texts else {}
        return {"exact_match": free, "constrained": constrained, "nearest_answer": sum(nearest) / len(nearest),
                **{f"{kind}_{name}": value for kind, found in captions.items() for name, value in found.items()}}

    result, trainer = options.train(
        model, lambda m, b, rng: decoder.loss_function(m, b, rng, args.label_smoothing), batches, args,
        evaluate=evaluate,
        describe={"phase": 2, "model": model.config.to_dict(), "rows": len(train_rows),
                  "batch_size": options.whole_batch(args),
                  "data_seed": args.data_seed},
    )
    if result.complete:
        options.finish(args, trainer, model, lambda: evaluate(model, result.step))
    return result.exit_code


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
