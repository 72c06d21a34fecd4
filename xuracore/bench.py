"""How fast the engine is here, each row beside plain NumPy in the same run: ``python -m xuracore bench``."""

import time

import numpy as np

from xuracore import autograd, nn, ops
from xuracore.kernels.optimizer import adamw_update
from xuracore.tensor import Tensor

CHAIN = 200  # multiplications and additions, each, of one chain


class Network(nn.Module):
    """Two layers: small enough for the engine's own cost to show."""

    def __init__(self, inputs=784, hidden=256, outputs=10, *, rng):
        self.first = nn.Linear(inputs, hidden, rng=rng)
        self.last = nn.Linear(hidden, outputs, rng=rng)

    def forward(self, x):
        return self.last(ops.relu(self.first(x)))


def digits(rng, batch=64, inputs=784, classes=10):
    """Random pictures and their labels."""
    return rng.random((batch, inputs), dtype=np.float32), rng.integers(0, classes, batch)


def training_step(network, pictures, labels):
    """A function that trains ``network`` by one step of AdamW and returns the loss."""
    state = [(p, np.zeros(p.size, np.float32), np.zeros(p.size, np.float32)) for p in network.parameters()]

    def step():
        loss = ops.cross_entropy(network(pictures), labels)
        loss.backward()
        for parameter, mean, square in state:
            gradient = np.ascontiguousarray(parameter.grad).reshape(-1)
            adamw_update.sized(10 * mean.size)(
                parameter.data.reshape(-1), gradient, mean, square, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.1, 0.001
            )
            parameter.grad = None
            parameter.mark_changed()
        return loss.item()

    return step


def numpy_training_step(network, pictures, labels):
    """The same step written by hand in NumPy."""
    weights = [p.data.copy() for p in network.parameters()]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    rows = np.arange(len(labels))

    def step():
        w1, b1, w2, b2 = weights
        h = np.maximum(pictures @ w1.T + b1, 0)
        z = h @ w2.T + b2
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z)
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(p[rows, labels]).mean()
        p[rows, labels] -= 1
        p /= len(labels)
        g = (p @ w2) * (h > 0)
        gradients = g.T @ pictures, g.sum(0), p.T @ h, p.sum(0)
        for w, g, (mean, square) in zip(weights, gradients, moments):
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            w *= 1 - 1e-3 * 0.01
            w -= 1e-3 * (mean / 0.1) / (np.sqrt(square / 0.001) + 1e-8)
        return float(loss)

    return step


def chain(z, a, b):
    """CHAIN times z · a + b."""
    for _ in range(CHAIN):
        z = z * a
        z = z + b
    return z


def alternate(ours, plain, seconds=0.5):
    """Smallest seconds of two functions, called in turns for ``seconds`` in all."""
    times, end = ([], []), time.perf_counter() + seconds
    ours(), plain()
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, kept in zip((ours, plain), times):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return tuple(map(min, times))


def rows(seconds=0.5):
    """Yield (what, unit, ours, NumPy, ratio); each row takes about ``seconds``."""
    rng = np.random.default_rng(0)
    x, y = (Tensor(np.ones(16, np.float32), requires_grad=True) for _ in range(2))
    plain = lambda: chain(x.data, y.data, x.data)  # noqa: E731

    def switched_off():
        with autograd.no_grad():
            chain(x, y, x)

    per_op = 1e6 / (2 * CHAIN)
    for what, ours in (
        ("small op, not recorded", switched_off),
        ("small op, recorded", lambda: chain(x, y, x)),
        ("small op, forward and backward", lambda: chain(x, y, x).sum().backward()),
    ):
        yield _row(what, "µs", per_op, *alternate(ours, plain, seconds))

    network, data = Network(rng=rng), digits(rng)
    steps = training_step(network, *data), numpy_training_step(network, *data)
    yield _row("training step, 784-256-10, batch 64", "ms", 1e3, *alternate(*steps, seconds))

    big = rng.standard_normal(1 << 20, dtype=np.float32)
    table = big.reshape(1024, 1024)
    for what, ours, by_hand in (
        ("SiLU", lambda: ops.silu(big), lambda: big / (1 + np.exp(-big))),
        ("GELU (tanh)", lambda: ops.gelu(big, approximate="tanh"), lambda: _gelu(big)),
        ("softmax of 1024", lambda: ops.softmax(table), lambda: _softmax(table)),
        ("layer norm of 1024", lambda: ops.layer_norm(table), lambda: _layer_norm(table)),
    ):
        yield _row(what, "ns/element", 1e9 / big.size, *alternate(ours, by_hand, seconds))

    matrix, vector = rng.standard_normal((4096, 2048), dtype=np.float32), big[:2048]
    times = alternate(lambda: ops.linear(vector, matrix), lambda: matrix @ vector, seconds)
    speeds = [matrix.nbytes / t / 1e9 for t in times]
    yield "matrix times vector, 32 MB", "GB/s", *speeds, times[0] / times[1]


def _row(what, unit, scale, ours, plain):
    return what, unit, ours * scale, plain * scale, ours / plain


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978846) * (x + np.float32(0.044715) * x * x * x)))


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _layer_norm(x):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered * centered).mean(axis=-1, keepdims=True) + np.float32(1e-5))


def print_table(seconds=0.5):
    """Print the rows as they come; returns 0."""
    print(f"{'':40}  {'unit':10}  {'xuracore':>9}  {'NumPy':>9}  ratio of times")
    for what, unit, ours, plain, ratio in rows(seconds):
        print(f"{what:40}  {unit:10}  {ours:9.3f}  {plain:9.3f}  {ratio:6.2f}", flush=True)
    return 0
