"""The command-line options that every training script has, and what they build."""

import argparse
import json
import sys
import time
from pathlib import Path

from training import optim, parallel, schedules
from training.config_file import ConfigParser, resolved, write_resolved
from training.loop import Trainer, TrainerConfig
from training.progress import duration
from xuracore import io
from xuracore.errors import ConfigError

OPTIMIZERS = {"adamw": optim.AdamW, "adam": optim.Adam, "lion": optim.Lion, "sgd": optim.SGD,
              "rmsprop": optim.RMSprop, "adafactor": optim.Adafactor}
SCHEDULES = ("cosine", "wsd", "linear", "constant")


def training_parser(description, epilog, **defaults):
    """A ConfigParser with the common options.

    defaults : values that suit the phase: steps, batch_size, lr, warmup, weight_decay, output_dir, and
        ``monitor``, the evaluated number that --patience watches; ``presets``, {preset: {"batch_size", "lr"}} where
        those of larger models differ.
    """
    parser = ConfigParser(description=description, epilog=epilog,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to train on")
    group.add_argument("--tiny", action="store_true",
                       help="the tiny preset on a small generated data set: a check that all works, in under a minute")
    group.add_argument("--preset", default="tiny", choices=("tiny", "small", "base"), help="sizes of a new model")
    group.add_argument("--data-dir", metavar="DIR", help="your own data: a manifest, or a format of --data-format; "
                       "without it, scenes are generated")
    group.add_argument("--scenes", type=positive, metavar="N", help="how many scenes to generate")
    group.add_argument("--data-seed", type=int, default=0, metavar="N", help="seed of the generated data (default 0)")
    others = defaults.setdefault("presets", {})
    group = parser.add_argument_group("how long and how fast")
    group.add_argument("--epochs", type=positive, metavar="N", help="passes over the data; wins over --steps")
    group.add_argument("--steps", type=positive, metavar="N", help=f"optimizer steps (default {defaults['steps']})")
    group.add_argument("--batch-size", type=positive, metavar="N",
                       help=f"default {defaults['batch_size']}{_of_presets(others, 'batch_size')}")
    group.add_argument("--accumulate", type=positive, default=1, metavar="N", help="batches per step (default 1)")
    group.add_argument("--lr", type=float,
                       help=f"peak learning rate (default {defaults['lr']:g}{_of_presets(others, 'lr')})")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    group.add_argument("--warmup", type=int, metavar="STEPS",
                       help=f"default {defaults['warmup']}, at most a tenth of all")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    group.add_argument("--weight-decay", "--wd", type=float, default=defaults["weight_decay"],
                       help=f"default {defaults['weight_decay']:g}; never on biases, norms, A, D, Δ or temperature")
    group.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default 1)")
    group.add_argument("--ema", type=float, metavar="DECAY",
                       help="keep averaged weights, for evaluation and the result")
    group = parser.add_argument_group("when it is enough")
    group.add_argument("--monitor", metavar="NAME", help="evaluated number whose best weights are kept in best/ and "
                       f"become the result (with --patience: {defaults.get('monitor', 'must be given')})")
    group.add_argument("--monitor-mode", choices=("max", "min"), default="max", help="which is best (default max)")
    group.add_argument("--patience", type=int, default=0, metavar="N",
                       help="stop after N evaluations without improvement (see --evaluate-every); 0: never")
    group.add_argument("--min-delta", type=float, default=0.0, metavar="X", help="what counts as an improvement")
    group = parser.add_argument_group("running")
    group.add_argument("--output-dir", default=defaults["output_dir"], metavar="DIR",
                       help=f"default {defaults['output_dir']}")
    group.add_argument("--resume", nargs="?", const="latest", metavar="latest",
                       help="go on from the last checkpoint in --output-dir; the result is bit for bit the same")
    group.add_argument("--overwrite", action="store_true", help="start afresh where --output-dir holds a run")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    group.add_argument("--threads", type=positive, metavar="N", help="default: what this process may use")
    group.add_argument("--mpi", action="store_true", help="use MPI even if no known launcher started several processes "
                       "(needs the extra 'mpi')")
    group.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    group.add_argument("--evaluate-every", "--eval-every", type=int, default=0, metavar="STEPS",
                       help="0: only at the end")
    group.add_argument("--log-every", type=positive, default=20, metavar="STEPS")
    group.add_argument("--tensorboard", action="store_true", help="also write event files, into OUTPUT_DIR/events "
                       "(needs the extra 'tensorboard')")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    parser.set_defaults(_defaults=defaults)
    return parser


def _of_presets(others, name):
    """", 8 with --preset base" for each preset that has a default of its own."""
    return "".join(f", {values[name]:g} with --preset {preset}" for preset, values in others.items())


def positive(text):
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def say(args, text):
    """A line to stderr, unless --quiet."""
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def prepare(args):
    """Settle ranks, threads and what depends on --tiny; ConfigError for options that contradict."""
    args._ranks = parallel.ranks(args.mpi)
    if not args._ranks.leads:
        args.quiet = True
    parallel.set_threads(args._ranks, args.threads)
    defaults = args._defaults
    of_preset = {**defaults, **defaults["presets"].get(args.preset, {})}
    args.batch_size = args.batch_size or of_preset["batch_size"]
    args.lr = of_preset["lr"] if args.lr is None else args.lr
    if args.resume not in (None, "latest"):
        raise ConfigError(f"--resume {args.resume!r}: runs live in --output-dir, and only 'latest' can be resumed")
    if args.patience:
        args.monitor = args.monitor or defaults.get("monitor")
        if not args.monitor or not args.evaluate_every:
            raise ConfigError("--patience counts evaluations of a number: it needs --evaluate-every STEPS"
                              + ("" if args.monitor else " and --monitor NAME"))


def whole_batch(args):
    """Samples in a batch of all ranks together; --batch-size is that of each."""
    return args.batch_size * args._ranks.size


def dry_run(args, **facts):
    """With --dry-run: print the options as they were understood and what the script knows; returns whether."""
    if args.dry_run and args._ranks.leads:
        facts.update({} if args._ranks.size == 1 else {"ranks": args._ranks.size})
        steps = {"steps": args.steps or args._defaults["steps"]} if not args.epochs else {"epochs": args.epochs}
        print(json.dumps({"would_train": {**facts, **steps}, "options": resolved(args)}, indent=2))
    return args.dry_run


def counter(args, what, every=30.0):
    """A report(done, total, …) that keeps one line up to date; elsewhere than on a terminal, a line now and then.

    every : seconds between those.  It says how long the rest will take, if that is more than some seconds.
    """
    if args.quiet:
        return None
    tty, started, spoken = sys.stderr.isatty(), time.monotonic(), 0.0

    def report(done, total, *_):
        nonlocal spoken
        passed = time.monotonic() - started
        left = passed / max(done, 1) * (total - done)
        estimate = f", {duration(left)} left" if left > 5 else ""
        if tty:
            text = f"\r{what} {done}/{total}{estimate}".ljust(len(what) + 30)
            print(text, end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif done >= total:
            print(f"{what} {total}", file=sys.stderr, flush=True)
        elif passed - spoken > every:
            spoken = passed
            print(f"{what} {done}/{total}{estimate}", file=sys.stderr, flush=True)

    return report


def train(module, loss_function, batches, args, *, lr_scales=None, evaluate=None, after_step=None, describe=None,
          output_dir=None, steps=None):
    """Run a Trainer as the options say; returns (result, trainer)."""
    if steps is None:
        per_epoch = len(batches) if hasattr(batches, "__len__") else None
        if args.epochs and per_epoch is None:
            raise ConfigError("--epochs needs a data set of known size; use --steps")
        steps = max(1, args.epochs * per_epoch // args.accumulate) if args.epochs else args.steps
        steps = steps or args._defaults["steps"]
    warmup = args._defaults["warmup"] if args.warmup is None else args.warmup
    warmup = min(warmup, steps // 10)
    settings = {} if args.schedule == "constant" else {"final": 0.02}
    schedule = schedules.by_name(args.schedule, args.lr, steps, warmup, **settings)
    groups = optim.parameter_groups(module, args.weight_decay, lr_scales)
    betas = {"betas": (0.9, 0.98)} if args.optimizer in ("adamw", "adam") else {}
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.lr, **betas)
    config = TrainerConfig(
        steps=steps, accumulate=args.accumulate, clip=args.clip, ema_decay=args.ema, seed=args.seed,
        log_every=args.log_every, save_every=args.save_every, evaluate_every=args.evaluate_every or steps,
        monitor=args.monitor if evaluate else None, monitor_mode=args.monitor_mode,
        patience=args.patience if evaluate else 0, min_delta=args.min_delta,
        event_log=args.tensorboard,
    )
    trainer = Trainer(module, loss_function, optimizer, schedule, batches, config, output_dir or args.output_dir,
                      evaluate=evaluate, after_step=after_step, describe=describe,
                      stream=None if args.quiet else sys.stderr, ranks=args._ranks)
    trainer.when_open = lambda: write_resolved(args, args.output_dir)
    return trainer.run(resume=bool(args.resume), overwrite=args.overwrite), trainer


def finish(args, trainer, model, evaluate):
    """Hand on what a complete run found: adopt the weights on all ranks, ``evaluate()`` and save on the first."""
    trainer.adopt()
    if args._ranks.leads:
        keep_result(args, model, evaluate())


def keep_result(args, model, metrics):
    """Write the finished model and its numbers to --output-dir, and print the numbers as a line of JSON."""
    folder = Path(args.output_dir)
    model.save_pretrained(folder / "model")
    io.save_json(folder / "metrics.json", metrics)
    say(args, f"saved {folder}/model")
    print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))


def run_script(main, argv=None):
    """Call ``main(argv)`` and exit; mistakes of the caller's are one line on stderr and code 2, Ctrl-C is 130."""
    try:
        sys.exit(main(argv))
    except (Exception, KeyboardInterrupt) as error:
        code, text = parallel.exit_code(error)
        if text is None:
            raise
        if text:
            print(f"error: {text}", file=sys.stderr)
        sys.exit(code)
