"""The selective scan of Mamba-1 alone: against torch, jax and mambapy, its memory, and its cost against length.

    python tests/benchmarks/selective_scan.py --versus torch|jax|mambapy --peer-python PYTHON_WITH_IT
    python tests/benchmarks/selective_scan.py --versus memory
    python tests/benchmarks/selective_scan.py --versus length [--up-to 65536]

1 x 2048 tokens, 1536 channels, state 16, float32, step sizes before softplus.  The first form prints
medians of forward and backward in turns with the peer: torch is the loop over tokens, jax is ``lax.scan``
compiled, mambapy its parallel scan.  "forward" alone is without a tape; "training" keeps one, and its
backward gives the gradients of u, delta, A, B, C and D.  The second prints the most memory that each holds at
once beyond its inputs (u, delta, A, B, C, D; the cotangent of y is not counted on either side), as a share of them:
all that NumPy, Python and the kernels allocate, as ``tracemalloc`` sees it once everything is compiled and loaded,
on one thread; for more the scratch memory of each is added, for whether it sees two at once is chance.
Of it y and the gradients of the six inputs must exist: they are 1.49 of the inputs.  Of the rest almost all is the
scratch memory of the kernels, a megabyte for each thread of a backward pass whatever the length.  The third
prints the cost of a token at growing lengths: a straight line is a constant.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.alternate import CLOCKS, main  # noqa: E402

LENGTH, CHANNELS, STATE = 2048, 1536, 16
JOBS = ("forward", "training")


def drawn(length=LENGTH, channels=CHANNELS):
    """u, delta, A, B, C, D, and a cotangent of y."""
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    a = -np.tile(np.arange(1, STATE + 1, dtype=np.float32), (channels, 1))
    arrays = [normal(1, length, channels), normal(1, length, channels) / 2 - 4, a, normal(1, length, STATE),
              normal(1, length, STATE), np.ones(channels, np.float32)]  # fmt: skip
    return arrays, normal(1, length, channels)


# ---------------------------------------------------------------------- ours
def ours(job, length=LENGTH, channels=CHANNELS):
    def make():
        import xuracore as xc

        arrays, above = drawn(length, channels)
        if job == "forward":
            return xc.no_grad()(lambda: xc.ops.selective_scan(*arrays, delta_softplus=True)), None
        inputs = [xc.Tensor(x, requires_grad=True) for x in arrays]

        def forward():
            for x in inputs:
                x.grad = None
            return xc.ops.selective_scan(*inputs, delta_softplus=True)[0]

        return forward, lambda y: y.backward(above)

    return make


# ---------------------------------------------------------------------- peers
def torch_prepare(threads):
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed for this interpreter; name one that has it by --peer-python")
    torch.set_num_threads(threads)


def mambapy_prepare(threads):
    torch_prepare(threads)
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        sys.exit("mambapy is not installed for this interpreter; name one that has it by --peer-python")


def jax_prepare(threads):
    try:
        import jax  # noqa: F401
    except ImportError:
        sys.exit("jax is not installed for this interpreter; name one that has it by --peer-python")


def in_torch(scan):
    def of(job):
        def make():
            import torch

            arrays, above = drawn()
            inputs = [torch.tensor(x, requires_grad=job == "training") for x in arrays]
            if job == "forward":
                return torch.no_grad()(lambda: scan(*inputs)), None
            cotangent = torch.tensor(above)

            def forward():
                for x in inputs:
                    x.grad = None
                return scan(*inputs)

            return forward, lambda y: y.backward(cotangent)

        return make

    return of


def torch_loop(u, delta, a, b, c, skip):
    import torch

    delta = torch.nn.functional.softplus(delta)
    h, ys = torch.zeros(1, CHANNELS, STATE), []
    for t in range(LENGTH):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1))
    return torch.stack(ys, 1) + skip * u


def mambapy_scan(u, delta, a, b, c, skip):
    import torch
    from mambapy.pscan import pscan

    delta = torch.nn.functional.softplus(delta)
    keep = torch.exp(delta[..., None] * a)
    enter = (delta * u)[..., None] * b[:, :, None]
    return (pscan(keep, enter) @ c[..., None]).squeeze(3) + skip * u


def jax_scan(job):
    def make():
        import jax
        import jax.numpy as jnp

        arrays, above = drawn()
        inputs, above = [jnp.asarray(x) for x in arrays], jnp.asarray(above)

        def scan(u, delta, a, b, c, skip):
            def step(h, now):
                u, delta, b, c = now
                h = jnp.exp(delta[:, None] * a) * h + (delta * u)[:, None] * b
                return h, h @ c

            now = u[0], jax.nn.softplus(delta[0]), b[0], c[0]
            _, y = jax.lax.scan(step, jnp.zeros((CHANNELS, STATE), jnp.float32), now)
            return y[None] + skip * u

        if job == "forward":
            compiled = jax.jit(scan)
            return lambda: compiled(*inputs).block_until_ready(), None
        both = jax.jit(lambda above, *given: jax.vjp(scan, *given)[1](above))
        # One compiled function does both, and is reported under backward: compare it with our sum.
        return lambda: None, lambda _: jax.block_until_ready(both(above, *inputs))

    return make


SIDES = {
    "ours": (lambda threads: None, {job: ours(job) for job in JOBS}),
    "torch": (torch_prepare, {job: in_torch(torch_loop)(job) for job in JOBS}),
    "mambapy": (mambapy_prepare, {job: in_torch(mambapy_scan)(job) for job in JOBS}),
    "jax": (jax_prepare, {job: jax_scan(job) for job in JOBS}),
}


# ---------------------------------------------------------------------- memory and length
def peak(job):
    """The most bytes held at once beyond the inputs, on one thread."""
    import tracemalloc

    import xuracore as xc

    xc.set_num_threads(1)
    forward, backward = ours(job)()
    for _ in range(4):  # compiles, and loads what is loaded at a second call
        tracemalloc.start()
        result = forward()
        if backward:
            backward(result)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        del result
    return found


def memory(threads):
    from xuracore.kernels.selective_scan import CHANNELS as width

    inputs, y = sum(x.nbytes for x in drawn()[0]), 4 * LENGTH * CHANNELS
    print(f"inputs {inputs / 1e6:.1f} MB; shares of them\n")
    print(f"| job | peak beyond them, one thread | {threads} threads | of which results and gradients |")
    print("|---|---:|---:|---:|")
    for job in JOBS:
        # Rows of a thread's scratch: of each token of a block 2 a state and 2, then of a state and of a token.
        rows = 2 * STATE + 3 if job == "forward" else 64 * (2 * STATE + 2) + 4 * STATE + 5
        found = peak(job)
        several, results = found + (threads - 1) * 4 * width * rows, y if job == "forward" else y + inputs
        print(f"| {job} | {' | '.join(f'{x / inputs:.3f}' for x in (found, several, results))} |")


def length(options):
    os.environ.setdefault("XURA_NUM_THREADS", str(options.threads))
    clock = CLOCKS[options.clock]
    print(f"{options.channels} channels, state {STATE}, {options.threads} thread(s), {options.clock} time\n")
    print("| tokens | forward ns a token | forward and backward ns a token |")
    print("|---:|---:|---:|")
    n = 1024
    while n <= options.up_to:
        cells = []
        for job in JOBS:
            forward, backward = ours(job, n, options.channels)()
            times = []
            for _ in range(options.rounds + 1):  # the first compiles
                start = clock()
                result = forward()
                if backward:
                    backward(result)
                times.append(clock() - start)
            cells.append(f"{statistics.median(times[1:]) / n * 1e9:.0f}")
        print(f"| {n} | {' | '.join(cells)} |", flush=True)
        n *= 2


if __name__ == "__main__":
    if "--side" in sys.argv:
        main(__doc__, SIDES)
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versus", choices=[*list(SIDES)[1:], "memory", "length"], default="torch")
    parser.add_argument("--up-to", type=int, default=65536, help="tokens of the longest sequence")
    parser.add_argument("--channels", type=int, default=256, help="channels of the runs against length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with the peer")
    options = parser.parse_args()
    if options.versus == "memory":
        memory(options.threads)
    elif options.versus == "length":
        length(options)
    else:
        sys.argv[1:] = ["--threads", str(options.threads), "--rounds", str(options.rounds), "--budget", "0.01",
                        "--clock", options.clock, "--peer-python", options.peer_python]  # fmt: skip
        main(__doc__, {"ours": SIDES["ours"], options.versus: SIDES[options.versus]})
