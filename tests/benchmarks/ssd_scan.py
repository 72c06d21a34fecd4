"""The scans and mixers of Mamba-2 and Mamba-3: against torch and transformers, each other, and the length.

    python tests/benchmarks/ssd_scan.py --peer-python PYTHON_WITH_TORCH [--threads 2] [--only prefill]
    python tests/benchmarks/ssd_scan.py --versus mamba3 [--threads 1] [--clock cpu]
    python tests/benchmarks/ssd_scan.py --versus length [--up-to 65536] [--threads 1] [--clock cpu]

The first prints medians of forward and backward of ours and the peer, in turns.  The peer's scan is the chunked
form written in torch, its mixer is transformers' Mamba2Mixer.  Sizes are those of the 130M model (prefill:
1 × 512 tokens, d 768, 24 heads of 64, state 128) and of a small training run (4 × 256 tokens, d 256, 8 heads).
The second sets Mamba-3 beside our Mamba-2 at the same sizes, the third prints the cost of a token at growing
lengths: a straight line is a constant.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.alternate import CLOCKS, main  # noqa: E402

SIZES = {"prefill": (1, 512, 768), "training": (4, 256, 256)}
HEAD, STATE, CHUNK = 64, 128, 64


def drawn(shape, seed=0):
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scan_arrays(batch, length, width):
    """x, dt, A, B, C, D of a scan."""
    import numpy as np

    heads = 2 * width // HEAD
    dt = np.exp(np.random.default_rng(1).uniform(np.log(1e-3), np.log(0.1), (batch, length, heads)))
    a = -np.random.default_rng(2).uniform(1, 16, heads)
    keys = [drawn((batch, length, 1, STATE), seed) for seed in (3, 4)]
    return [drawn((batch, length, heads, HEAD)), *(x.astype(np.float32) for x in (dt, a)), *keys, drawn(heads)]


# ---------------------------------------------------------------------- ours
def ours_prepare(threads):
    pass


def ours_scan(sizes, backward):
    def make():
        import numpy as np

        import xuracore as xc

        arrays = scan_arrays(*sizes)
        inputs = [xc.Tensor(x, requires_grad=backward) for x in arrays]
        ones = np.ones_like(arrays[0])
        return lambda: xc.ops.ssd_scan(*inputs), (lambda out: out[0].backward(ones)) if backward else None

    return make


def ours_mixer(sizes, backward, kind="Mamba2"):
    def make():
        import numpy as np

        import xuracore as xc
        import xuramamba

        batch, length, width = sizes
        mixer = getattr(xuramamba, kind)(width)
        x = xc.Tensor(drawn((batch, length, width)), requires_grad=backward)
        ones = np.ones_like(x.data)
        if backward:
            return lambda: mixer(x)[0], lambda y: y.backward(ones)
        return xc.no_grad()(lambda: mixer(x)[0]), None

    return make


def ours_decode(kind="Mamba2"):
    def make():
        import xuracore as xc
        import xuramamba

        with xc.no_grad():
            mixer = getattr(xuramamba, kind)(SIZES["prefill"][2])
            _, state = mixer(xc.Tensor(drawn((1, 8, SIZES["prefill"][2]))))
        one = xc.Tensor(drawn((1, 1, SIZES["prefill"][2])))
        return xc.no_grad()(lambda: mixer(one, state)[0]), None

    return make


# ---------------------------------------------------------------------- the peer
def torch_prepare(threads):
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed for this interpreter; name one that has it by --peer-python")
    torch.set_num_threads(threads)


def chunked_in_torch(x, dt, a, b, c, skip):
    """The dual form, all chunks at once, states passed from chunk to chunk."""
    import torch

    batch, length, heads, width = x.shape
    cut = (batch, length // CHUNK, CHUNK)
    total = (dt * a).reshape(*cut, heads).cumsum(2)
    u = (x * dt[..., None]).reshape(*cut, heads, width)
    b, c = (m.reshape(*cut, STATE) for m in (b, c))
    rise = total[:, :, :, None] - total[:, :, None]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()[:, :, None]
    weights = torch.where(lower, rise, -torch.inf).exp() * (c @ b.transpose(2, 3))[..., None]
    y = torch.einsum("bnijh,bnjhp->bnihp", weights, u)
    ends = total[:, :, -1:]
    local = torch.einsum("bnjs,bnjhp->bnhps", b, u * (ends - total).exp()[..., None])
    state, entering = torch.zeros_like(local[:, 0]), []
    for i in range(cut[1]):
        entering.append(state)
        state = ends[:, i, 0].exp()[..., None, None] * state + local[:, i]
    carried = torch.einsum("bnis,bnhps->bnihp", c, torch.stack(entering, 1)) * total.exp()[..., None]
    return (y + carried).reshape(x.shape) + skip[:, None] * x


def torch_scan(sizes, backward):
    def make():
        import torch

        inputs = [torch.tensor(x, requires_grad=backward) for x in scan_arrays(*sizes)]
        ones = torch.ones_like(inputs[0])

        def forward():
            with torch.set_grad_enabled(backward):
                return chunked_in_torch(*inputs)

        return forward, (lambda y: y.backward(ones)) if backward else None

    return make


def torch_mixer(sizes, backward):
    def make():
        import torch

        mixer = transformers_mixer(sizes[2])
        x = torch.tensor(drawn(sizes), requires_grad=backward)
        ones = torch.ones_like(x)

        def forward():
            with torch.set_grad_enabled(backward):
                return mixer(x)

        return forward, (lambda y: y.backward(ones)) if backward else None

    return make


def transformers_mixer(width):
    try:
        from transformers import Mamba2Config, Mamba2ForCausalLM
    except ImportError:
        sys.exit("transformers is not installed for this interpreter; name one that has it by --peer-python")
    heads = 2 * width // HEAD
    config = Mamba2Config(
        vocab_size=8, hidden_size=width, num_hidden_layers=1, num_heads=heads, head_dim=HEAD, n_groups=1,
        state_size=STATE,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval().backbone.layers[0].mixer


SIDES = {
    "ours": (ours_prepare, {
        **{f"scan, {name}": ours_scan(sizes, name == "training") for name, sizes in SIZES.items()},
        **{f"mixer, {name}": ours_mixer(sizes, name == "training") for name, sizes in SIZES.items()},
    }),
    "torch": (torch_prepare, {
        **{f"scan, {name}": torch_scan(sizes, name == "training") for name, sizes in SIZES.items()},
        **{f"mixer, {name}": torch_mixer(sizes, name == "training") for name, sizes in SIZES.items()},
    }),
}  # fmt: skip


# ---------------------------------------------------------------------- ours against ours
def alternated(cases, rounds, clock):
    """{name: median seconds} of calls in turn."""
    found = {name: [] for name in cases}
    for forward, backward in cases.values():
        result = forward()
        if backward is not None:
            backward(result)
    for _ in range(rounds):
        for name, (forward, backward) in cases.items():
            start = clock()
            result = forward()
            if backward is not None:
                backward(result)
            found[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def versus(options):
    clock = CLOCKS[options.clock]
    if options.versus == "mamba3":
        print("| job | Mamba-2 | Mamba-3 | ratio |\n|---|---:|---:|---:|")
        jobs = {f"{name} {sizes}": (ours_mixer, sizes, name == "training") for name, sizes in SIZES.items()}
        jobs["decode, 1 token, d 768"] = (ours_decode,)
        for label, (make, *arguments) in jobs.items():
            cases = {kind: make(*arguments, kind=kind)() for kind in ("Mamba2", "Mamba3")}
            two, three = alternated(cases, options.rounds * (10 if make is ours_decode else 1), clock).values()
            print(f"| {label} | {two * 1e3:.3g} ms | {three * 1e3:.3g} ms | {three / two:.2f} |", flush=True)
        return
    print("| tokens | Mamba-2, ms | µs a token | Mamba-3, ms | µs a token |\n|---:|---:|---:|---:|---:|")
    length = 1024
    while length <= options.up_to:
        cases = {kind: ours_mixer((1, length, 256), False, kind)() for kind in ("Mamba2", "Mamba3")}
        cells = [str(length)]
        for seconds in alternated(cases, options.rounds, clock).values():
            cells += [f"{seconds * 1e3:.4g}", f"{seconds / length * 1e6:.3g}"]
        print("| " + " | ".join(cells) + " |", flush=True)
        length *= 4


if __name__ == "__main__":
    if not any(argument.startswith("--versus") for argument in sys.argv):
        main(__doc__, SIDES)
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--versus", choices=("mamba3", "length"))
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of all threads")
        parser.add_argument("--up-to", type=int, default=65536, help="greatest length")
        given = parser.parse_args()
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XURA_NUM_THREADS"):
            os.environ[name] = str(given.threads)
        versus(given)
