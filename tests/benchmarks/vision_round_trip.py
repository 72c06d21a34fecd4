"""Vision models saved by transformers, read here by their names: the same features, and other towers refused.

    python tests/benchmarks/vision_round_trip.py --peer-python PYTHON_WITH_TRANSFORMERS

Random-weight ViT, DINOv2 (plain and with gates), DINOv2 with registers (both), I-JEPA and V-JEPA 2 models are
saved by transformers, whole, in shards, as BF16 and with a classifier on top; pictures of the trained size
and of another one, and videos, go through both.  Tables of positions are interpolated by torch and here.
Then CLIP, SigLIP, BEiT, DeiT and DINOv3 towers are saved, which must be refused by their names.  Ends with 1
if a difference is larger than rounding explains.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np  # noqa: E402

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 4}
DENSE = {**SIZES, "intermediate_size": 96}
CLIP = {name: value for name, value in SIZES.items() if name != "image_size"} | {
    "crop_size": 24, "frames_per_clip": 4, "pred_hidden_size": 24, "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1, "num_pooler_layers": 1}
MODELS = {  # name: (model class, configuration class, settings, (shapes of the pixels))
    "ViT": ("ViT", DENSE, [(2, 3, 24, 24), (1, 3, 32, 16)]),
    "DINOv2": ("Dinov2", SIZES, [(2, 3, 24, 24), (1, 3, 32, 16), (1, 3, 12, 12)]),
    "DINOv2, SwiGLU": ("Dinov2", {**SIZES, "use_swiglu_ffn": True}, [(2, 3, 24, 24)]),
    "DINOv2, registers": ("Dinov2WithRegisters", SIZES, [(2, 3, 24, 24), (1, 3, 32, 16), (1, 3, 12, 12)]),
    "DINOv2, registers, SwiGLU": ("Dinov2WithRegisters", {**SIZES, "use_swiglu_ffn": True}, [(2, 3, 24, 24)]),
    "I-JEPA": ("IJepa", DENSE, [(2, 3, 24, 24), (1, 3, 32, 16)]),
    "V-JEPA 2": ("VJEPA2", CLIP, [(1, 4, 3, 24, 24), (2, 1, 3, 24, 24), (1, 6, 3, 32, 24)]),
}
REFUSED = {"CLIPVisionModel": "CLIPVisionConfig", "SiglipVisionModel": "SiglipVisionConfig",
           "Siglip2VisionModel": "Siglip2VisionConfig", "BeitModel": "BeitConfig", "DeiTModel": "DeiTConfig",
           "DINOv3ViTModel": "DINOv3ViTConfig"}
TABLES = ((37, 16), (16, 37), (14, 24), (7, 5))
WAYS = ("whole", "in shards", "as BF16", "with a classifier")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and transformers")
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [options.peer_python, __file__, "--make", folder]
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stderr.strip()}\n\nthe peer failed: --peer-python needs torch and transformers")
        good = [compare(Path(folder)), positions(Path(folder)), refuse(Path(folder))]
    print("\nAll within rounding, all refused." if all(good) else "\nSOMETHING DIFFERS.")
    return 0 if all(good) else 1


def make(folder):
    """The folders, each with the features that transformers finds."""
    import torch
    import transformers

    for name, (family, settings, shapes) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**settings)
        plain = noisy(torch, getattr(transformers, f"{family}Model")(config).eval())
        kind = "ForVideoClassification" if family == "VJEPA2" else "ForImageClassification"
        top = noisy(torch, getattr(transformers, family + kind)(config).eval())
        inside = next(child for child in top.children() if type(child) is type(plain))
        half = getattr(transformers, f"{family}Model")(config).eval()
        half.load_state_dict({key: value.bfloat16().float() for key, value in plain.state_dict().items()})
        for way, model, saved in zip(WAYS, (plain, plain, half, inside), (plain, plain, half, top)):
            target = folder / name / way
            pixels = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
            with torch.no_grad():
                found = [features(family, model, x, settings) for x in pixels]
            saved = saved.bfloat16() if way == "as BF16" else saved
            saved.save_pretrained(target, max_shard_size="50KB" if way == "in shards" else "5GB")
            np.savez(target / "results.npz", **{f"in{i}": x.numpy() for i, x in enumerate(pixels)},
                     **{f"out{i}": y.numpy() for i, y in enumerate(found)})
    resize = torch.nn.functional.interpolate
    for old, new in TABLES:
        x = torch.randn(1, 1, old, old, dtype=torch.float64)
        ways = {"hf": {"size": (new, new)}, "timm": {"size": (new, new), "antialias": True},
                "dinov2": {"scale_factor": ((new + 0.1) / old,) * 2}}
        found = {how: resize(x, mode="bicubic", align_corners=False, **more).numpy() for how, more in ways.items()}
        np.savez(folder / f"{old} to {new}.npz", x=x.numpy(), **found)
    for model, config in REFUSED.items():
        settings = {key: value for key, value in DENSE.items() if key != "image_size" or "2" not in model}
        config = getattr(transformers, config)(**settings)
        getattr(transformers, model)(config).save_pretrained(folder / "refused" / model)


def noisy(torch, model):
    """Norms, scales, tokens and biases away from 0 and 1, so that a mix-up shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def features(family, model, x, settings):
    if family == "VJEPA2":
        return model(pixel_values_videos=x, skip_predictor=True).last_hidden_state
    more = {"interpolate_pos_encoding": True} if family in ("ViT", "IJepa") and x.shape[-1] != 24 else {}
    return model(x, **more).last_hidden_state


def compare(folder):
    from xuravljepa.vit import VisionTransformer

    print("| model | saved | recognised as | inputs | largest difference | largest feature |")
    print("|---|---|---|---|---|---|")
    good = True
    for name, (_, _, shapes) in MODELS.items():
        for way in WAYS:
            model = VisionTransformer.from_pretrained(folder / name / way).eval()
            with np.load(folder / name / way / "results.npz") as stored:
                pairs = [(model(stored[f"in{i}"]).data, stored[f"out{i}"]) for i in range(len(shapes))]
            worst = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
            largest = max(float(np.abs(theirs).max()) for _, theirs in pairs)
            good = good and worst <= 1e-5 * max(largest, 1)
            sizes = ", ".join("×".join(map(str, shape)) for shape in shapes)
            print(f"| {name} | {way} | {model.family} | {sizes} | {worst:.1e} | {largest:.1f} |")
    return good


def positions(folder):
    """The three ways of interpolating a table, against torch's functions that define them."""
    from xuravljepa.vit_positions import INTERPOLATIONS, bicubic_matrix

    print("\n| interpolation | " + " | ".join(f"{old} → {new}" for old, new in TABLES) + " |")
    print("|---" * (len(TABLES) + 1) + "|")
    good = True
    for how in INTERPOLATIONS:
        worst = []
        for old, new in TABLES:
            matrix = bicubic_matrix(old, new, how)
            with np.load(folder / f"{old} to {new}.npz") as stored:
                worst.append(float(np.abs(matrix @ stored["x"][0, 0] @ matrix.T - stored[how][0, 0]).max()))
        print(f"| {how} | " + " | ".join(f"{one:.1e}" for one in worst) + " |")
        good = good and max(worst) < 1e-6
    return good


def refuse(folder):
    from xuracore.errors import FormatError
    from xuravljepa.vit import VisionTransformer

    print("\n| tower | answer |\n|---|---|")
    good = True
    for name in REFUSED:
        try:
            VisionTransformer.from_pretrained(folder / "refused" / name)
            said, good = "READ", False
        except FormatError as error:
            said = error.reason.partition(", which")[0]
        print(f"| {name} | {said} |")
    return good


if __name__ == "__main__":
    sys.exit(main())
