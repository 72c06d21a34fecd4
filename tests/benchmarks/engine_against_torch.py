"""The engine beside torch eager and jitted jax: small ops, a chain, a training step, import and size on disk.

Each side lives in a process of its own, and only one works at a time: the parent asks for a few calls of a case from
one, then from the next, round after round, so that whatever else the machine does falls on all.  Prints Markdown.

    python tests/benchmarks/engine_against_torch.py --peer-python /path/to/python-with-torch-and-jax

Small op: 16 numbers of float32.  Chain: 400 multiplications and additions, then backward; per op.  Training step:
784-256-10 with ReLU, batch 64, cross-entropy, AdamW (torch: its fused one; jax: one jitted function).
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SMALL, CHAIN, SIZES, BATCH = 16, 200, (784, 256, 10), 64
UNITS = {"training step": (1e3, "ms")}


def chain(z, a, b):
    for _ in range(CHAIN):
        z = z * a
        z = z + b
    return z


def weights():
    rng = np.random.default_rng(0)
    shapes = [s for i, o in zip(SIZES, SIZES[1:]) for s in ((o, i), (o,))]
    return [(rng.standard_normal(s) * 0.05).astype(np.float32) for s in shapes]


def batch():
    rng = np.random.default_rng(1)
    return rng.random((BATCH, SIZES[0]), dtype=np.float32), rng.integers(0, SIZES[-1], BATCH)


# ---------------------------------------------------------------------- the sides: {case: (calls per call, function)}
def ours():
    import xuracore as xc
    from training.optim import AdamW
    from xuracore import nn, ops

    x, y = (xc.tensor(np.full(SMALL, v, np.float32), requires_grad=True) for v in (0.5, 0.25))
    one = np.ones(SMALL, np.float32)

    def without(call):
        def run():
            with xc.no_grad():
                for _ in range(100):
                    call()
        return run

    small = {"multiply": lambda: x * y, "add": lambda: x + y, "exp": lambda: ops.exp(x), "sum": lambda: x.sum()}
    pictures, labels = batch()
    parameters = [nn.Parameter(w) for w in weights()]
    optimizer = AdamW(parameters, lr=1e-3)

    def step():
        h = ops.relu(ops.linear(pictures, *parameters[:2]))
        loss = ops.cross_entropy(ops.linear(h, *parameters[2:]), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return _cases(small, without, one, lambda: chain(x, y, x).sum().backward(), lambda: chain(x, y, x), step)


def torch():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    x, y = (torch.full((SMALL,), v, requires_grad=True) for v in (0.5, 0.25))
    one = torch.ones(SMALL)

    def without(call):
        def run():
            with torch.no_grad():
                for _ in range(100):
                    call()
        return run

    small = {"multiply": lambda: x * y, "add": lambda: x + y, "exp": lambda: torch.exp(x), "sum": lambda: x.sum()}
    pictures, labels = map(torch.from_numpy, batch())
    parameters = [torch.from_numpy(w).requires_grad_() for w in weights()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    F = torch.nn.functional

    def step():
        h = F.relu(F.linear(pictures, *parameters[:2]))
        loss = F.cross_entropy(F.linear(h, *parameters[2:]), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return _cases(small, without, one, lambda: chain(x, y, x).sum().backward(), lambda: chain(x, y, x), step)


def _cases(small, without, one, both, forward, step):
    cases = {}
    for name, call in small.items():
        cases[f"{name}, no gradient"] = 100, without(call)
        cases[f"{name}, recorded"] = 100, lambda call=call: [call() for _ in range(100)] and None
        cotangent = one if name != "sum" else one[0]
        cases[f"{name}, forward and backward"] = (
            100, lambda call=call, g=cotangent: [call().backward(g) for _ in range(100)] and None
        )
    cases["chain, forward"] = 2 * CHAIN, forward
    cases["chain, forward and backward"] = 2 * CHAIN, both
    cases["training step"] = 1, step
    return cases


def jax():
    import jax
    from jax import numpy as jnp

    x, y = (jnp.full(SMALL, v) for v in (0.5, 0.25))
    ops = {"multiply": lambda x, y: x * y, "add": lambda x, y: x + y, "exp": lambda x, y: jnp.exp(x),
           "sum": lambda x, y: x.sum()}
    cases = {}
    for name, op in ops.items():
        jitted = jax.jit(op)
        slope = jax.jit(jax.grad(lambda x, y, op=op: op(x, y).sum(), argnums=(0, 1)))
        cases[f"{name}, no gradient"] = 100, lambda f=jitted: jax.block_until_ready([f(x, y) for _ in range(100)])
        cases[f"{name}, forward and backward"] = (
            100, lambda f=slope: jax.block_until_ready([f(x, y) for _ in range(100)])
        )
    pictures, labels = map(jnp.asarray, batch())

    def loss(w):
        h = jax.nn.relu(pictures @ w[0].T + w[1])
        return -jax.nn.log_softmax(h @ w[2].T + w[3])[jnp.arange(BATCH), labels].mean()

    def update(w, m, v, t):
        value, g = jax.value_and_grad(loss)(w)
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g)]
        new = [p * (1 - 1e-5) - 1e-3 * (a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.999**t)) + 1e-8)
               for p, a, b in zip(w, m, v)]
        return value, new, m, v

    jitted = jax.jit(update, donate_argnums=(0, 1, 2))
    w = [jnp.asarray(a) for a in weights()]
    state = [w, [jnp.zeros_like(a) for a in w], [jnp.zeros_like(a) for a in w], 1.0]

    def step():
        value, *state[:3] = jitted(*state)
        state[3] += 1
        return float(value)

    cases["training step"] = 1, step
    return cases


def numpy():
    from xuracore import bench

    network = bench.Network(*SIZES, rng=np.random.default_rng(0))
    x, y = (np.full(SMALL, v, np.float32) for v in (0.5, 0.25))
    small = {"multiply": lambda: x * y, "add": lambda: x + y, "exp": lambda: np.exp(x), "sum": lambda: x.sum()}
    cases = {f"{n}, no gradient": (100, lambda f=f: [f() for _ in range(100)] and None) for n, f in small.items()}
    cases["training step"] = 1, bench.numpy_training_step(network, *batch())
    return cases


SIDES = {"ours": ours, "NumPy": numpy, "torch": torch, "jax": jax}


# ---------------------------------------------------------------------- taking turns
def serve(side, clock, budget):
    """In a child: answer each case named on stdin with the seconds of one call, the smallest of a turn."""
    cases = SIDES[side]()
    print(json.dumps(sorted(cases)), flush=True)
    for line in sys.stdin:
        count, call = cases[line.rstrip("\n")]
        call()
        times, end = [], time.perf_counter() + budget
        while len(times) < 3 or time.perf_counter() < end:
            start = clock()
            call()
            times.append(clock() - start)
        print(json.dumps([min(times) / count, statistics.median(times) / count]), flush=True)


def start(side, options):
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XURA_NUM_THREADS"
    environment = {**os.environ, **dict.fromkeys(names, str(options.threads)), "JAX_PLATFORMS": "cpu"}
    if options.threads == 1:
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    python = sys.executable if side in ("ours", "NumPy") else options.peer_python
    command = [python, __file__, "--side", side, "--clock", options.clock, "--budget", str(options.budget)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    answer = child.stdout.readline()
    if not answer:
        print(f"{side} cannot be imported by {python}: left out\n", file=sys.stderr)
        return None, ()
    return child, json.loads(answer)


def compare(options):
    children = {side: start(side, options) for side in SIDES}
    children = {side: child for side, child in children.items() if child[0]}
    peers = [side for side in children if side != "ours"]
    print(f"{options.threads} thread(s), {options.clock} time, median of {options.rounds} turns' "
          f"{'minima' if options.statistic == 'min' else 'medians'}\n")
    print("| | unit | ours | " + " | ".join(peers) + " | " + " | ".join(f"ours / {p}" for p in peers) + " |")
    print("|---|---|" + "---:|" * (1 + 2 * len(peers)))
    for case in ours():
        if options.only not in case:
            continue
        found = {side: [] for side in children}
        for _ in range(options.rounds):
            for side, (child, cases) in children.items():
                if case in cases:
                    child.stdin.write(case + "\n")
                    child.stdin.flush()
                    found[side].append(json.loads(child.stdout.readline())[options.statistic == "median"])
        middle = {side: statistics.median(times) if times else None for side, times in found.items()}
        scale, unit = UNITS.get(case, (1e6, "µs"))
        cells = [f"{middle[s] * scale:.2f}" if middle[s] else "" for s in ("ours", *peers)]
        cells += [f"{middle['ours'] / middle[p]:.2f}" if middle[p] else "" for p in peers]
        print(f"| {case} | {unit} | " + " | ".join(cells) + " |", flush=True)
    for child, _ in children.values():
        child.stdin.close()
        child.wait()


# ---------------------------------------------------------------------- import and size
def _children_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def import_seconds(python, code, clock, rounds=3):
    """Smallest seconds of a process that runs ``code``, less those of one that runs nothing."""
    now = time.perf_counter if clock == "wall" else _children_seconds

    def once(text):
        begin = now()
        subprocess.run([python, "-c", text], check=True, capture_output=True, cwd=Path(__file__).parents[2])
        return now() - begin

    once(code)
    return min(once(code) for _ in range(rounds)) - min(once("pass") for _ in range(rounds))


SIZE = """
import importlib.metadata as m, json, sys
def size(name):
    return sum(f.locate().stat().st_size for f in m.files(name) or () if f.locate().is_file())
print(json.dumps({n: size(n) for n in sys.argv[1:]}))
"""


def sizes(python, *names):
    """{package: bytes of its installed files}; None if one is missing."""
    result = subprocess.run([python, "-c", SIZE, *names], capture_output=True, text=True)
    return json.loads(result.stdout) if result.returncode == 0 else None


def own_size():
    root = Path(importlib.util.find_spec("xuracore").origin).parents[1]
    files = [p for name in ("xuracore", "xuramamba", "xuravljepa", "training") for p in (root / name).rglob("*")]
    return sum(p.stat().st_size for p in files if p.is_file() and "__pycache__" not in p.parts)


def footprint(options):
    """Import times and installed sizes."""
    print(f"\n| import, a new process each, without starting Python | s of {options.clock} time |\n|---|---:|")
    for python, code in (
        (sys.executable, "import numpy"), (sys.executable, "import xuracore"),
        (sys.executable, "import xuracore as x, numpy as n; x.ops.silu(n.ones(4, n.float32))"),
        (options.peer_python, "import torch"), (options.peer_python, "import jax.numpy"),
        (options.peer_python, "import torch, transformers; transformers.AutoModel"),
    ):
        try:
            print(f"| `{code}` | {import_seconds(python, code, options.clock):.2f} |", flush=True)
        except subprocess.CalledProcessError:
            print(f"| `{code}` | not installed |")
    print("\n| installed | MB |\n|---|---:|")
    stack = sizes(sys.executable, "numpy", "numba", "llvmlite", "pillow")
    mine = own_size()
    if stack:
        listed = ", ".join(f"{n} {s / 1e6:.0f}" for n, s in stack.items())
        print(f"| ours: {listed}, xura {mine / 1e6:.1f} | {(sum(stack.values()) + mine) / 1e6:.0f} |")
        print(f"| ours without Numba | {(stack['numpy'] + stack['pillow'] + mine) / 1e6:.0f} |")
    for names in (("torch", "transformers"), ("jax", "jaxlib")):
        found = sizes(options.peer_python, *names)
        if found:
            listed = ", ".join(f"{n} {s / 1e6:.0f}" for n, s in found.items())
            print(f"| {listed}, without what they need | {sum(found.values()) / 1e6:.0f} |")
    print(f"\nPython {sys.version.split()[0]}, NumPy {metadata.version('numpy')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter with torch and jax")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds per turn")
    parser.add_argument("--statistic", choices=("median", "min"), default="median", help="of the calls of a turn")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time; fair on a busy machine with one thread")
    parser.add_argument("--footprint", action="store_true", help="only import times and sizes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, CLOCKS[options.clock], options.budget)
        return
    if not options.footprint:
        compare(options)
    footprint(options)


if __name__ == "__main__":
    main()
