"""Phase 0: train a small X-Encoder on generated scenes."""

import sys
from pathlib import Path

import numpy as np

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from training import options, parallel
from training.phases import pretrain
from xuracore import no_grad
from xuravljepa.presets import VLJEPAConfig

EPILOG = """\
Every step draws fresh scenes.  Each visual token learns to say what is centred in its patch and what its
neighbours are; [CLS] learns the counts.  With real weights (see --vit of train_jepa.py) this phase is
skipped.

examples:
  python training/scripts/pretrain_vit.py --tiny              a quick check
  python training/scripts/pretrain_vit.py --steps 3000        the shipped X-Encoder, about 20 minutes on two cores
"""


def evaluate(model, batches, count=4):
    """Accuracy of each target over ``count`` batches of unseen scenes."""
    found = {}
    with no_grad():
        for step in range(count):
            for name, value in pretrain.loss_function(model, batches.batch(step))[1].items():
                found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


@parallel.together
def main(argv=None):
    parser = options.training_parser(__doc__, EPILOG, steps=3000, batch_size=48, lr=1e-3, warmup=200,
                                     weight_decay=0.02, output_dir="runs/vit")
    args = parser.parse_args(argv)
    options.prepare(args)
    args.steps = args.steps or (30 if args.tiny else None)
    if args.data_dir:
        parser.error("phase 0 needs the dense labels of generated scenes; for your own pictures use real weights "
                     "(train_jepa.py --vit DIR), or let the X-Encoder learn in phase 1 (--train-encoder)")
    config = VLJEPAConfig.preset(args.preset).vision
    model = pretrain.SceneReader(config, rng=np.random.default_rng(args.seed))
    grid = config.image_size // config.patch_size
    if options.dry_run(args, phase=0, parameters=model.vit.parameter_count()):
        return 0
    options.say(args, f"phase 0: ViT of {model.vit.parameter_count():,} parameters on generated scenes")
    batches = pretrain.SceneBatches(options.whole_batch(args), args.data_seed, patch_grid=grid, ranks=args._ranks)
    unseen = pretrain.SceneBatches(64, args.data_seed, split="val", patch_grid=grid)
    result, trainer = options.train(
        model, pretrain.loss_function, batches, args,
        evaluate=lambda model, step: evaluate(model, unseen),
        describe={"phase": 0, "vision": config.to_dict(), "batch_size": options.whole_batch(args),
                  "data_seed": args.data_seed},
    )
    if result.complete:
        options.finish(args, trainer, model.vit, lambda: evaluate(model, unseen, 16))
    return result.exit_code


if __name__ == "__main__":
    options.run_script(main, sys.argv[1:])
