"""A Vision Transformer's forward pass against torch: ViT-L/16 by default, 224², random weights, no gradients.

    python tests/benchmarks/vit.py --peer-python PYTHON_WITH_TORCH

Each side runs in its own process, in turns (see alternate.py).  Rows: our module; beside it the same network
written by hand in torch (fused attention, ``inference_mode``), and Hugging Face's ViTModel if ``transformers`` is
there too.  The last rows are the matrix products alone, the floor of both: 24 layers of
(197, 1024) times (1024, 3072), (1024, 1024), (1024, 4096) and (4096, 1024).
"""

import functools
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.alternate import main  # noqa: E402

SIZES = {"ViT-S/16": (384, 12, 6), "ViT-B/16": (768, 12, 12), "ViT-L/16": (1024, 24, 16)}  # width, depth, heads


def prepare_ours(threads):
    import xuracore as xc

    xc.set_num_threads(threads)


def ours(width, depth, heads, batch):
    import numpy as np

    import xuracore as xc
    from xuravljepa.vit import VisionTransformer, VitConfig

    model = VisionTransformer(VitConfig(d_model=width, depth=depth, n_heads=heads)).eval()
    pixels = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), np.float32)

    def forward():
        with xc.no_grad():
            return model(pixels)

    return forward, None


def our_products(width, depth, rows):
    import numpy as np

    from xuracore import ops

    rng = np.random.default_rng(0)
    layers = [[rng.standard_normal(shape, np.float32) for shape in _weights(width)] for _ in range(depth)]
    narrow, wide = (rng.standard_normal((rows, n), np.float32) for n in (width, 4 * width))

    def forward():
        for qkv, proj, up, down in layers:
            for x, weight in ((narrow, qkv), (narrow, proj), (narrow, up), (wide, down)):
                ops.linear(x, weight)

    return forward, None


def _weights(width):
    return (3 * width, width), (width, width), (4 * width, width), (width, 4 * width)


# ---------------------------------------------------------------------- torch
def prepare_torch(threads):
    try:
        import torch
    except ImportError:
        raise SystemExit("torch is missing: name an interpreter that has it with --peer-python") from None
    torch.set_num_threads(threads)


def by_hand(width, depth, heads, batch):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, n, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, width, 16, 16)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.places = nn.Parameter(torch.zeros(1, 197, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm = nn.LayerNorm(width, 1e-6)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.norm(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places))

    return _inference(Vit(), batch)


def hugging_face(width, depth, heads, batch):
    from transformers import ViTConfig, ViTModel

    settings = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
                "intermediate_size": 4 * width}
    return _inference(ViTModel(ViTConfig(**settings), add_pooling_layer=False), batch)


def _inference(model, batch):
    import torch

    model.eval()
    pixels = torch.randn(batch, 3, 224, 224)

    def forward():
        with torch.inference_mode():
            return model(pixels)

    return forward, None


def torch_products(width, depth, rows):
    import torch
    from torch.nn import functional as F

    layers = [[torch.randn(shape) for shape in _weights(width)] for _ in range(depth)]
    narrow, wide = torch.randn(rows, width), torch.randn(rows, 4 * width)

    def forward():
        with torch.inference_mode():
            for qkv, proj, up, down in layers:
                for x, weight in ((narrow, qkv), (narrow, proj), (narrow, up), (wide, down)):
                    F.linear(x, weight)

    return forward, None


def cases():
    own, peer = {}, {}
    for name, (width, depth, heads) in SIZES.items():
        for batch in (1, 4):
            label, sizes = f"{name}, batch {batch}", (width, depth, heads, batch)
            own[label] = own[f"{label}, Hugging Face"] = functools.partial(ours, *sizes)
            peer[label], peer[f"{label}, Hugging Face"] = (
                functools.partial(make, *sizes) for make in (by_hand, hugging_face))
        own[f"{name}, products"] = functools.partial(our_products, width, depth, 197)
        peer[f"{name}, products"] = functools.partial(torch_products, width, depth, 197)
    return own, peer


if __name__ == "__main__":
    own, peer = cases()
    main(__doc__, {"ours": (prepare_ours, own), "torch": (prepare_torch, peer)})
