"""S4 and S4D equal independent references; their kernel, their scan and the dense system are one."""

import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore.errors import ConfigError, ShapeError
from xuramamba import S4, S4D, hippo

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name):
    vectors = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return {key: vectors[key] for key in vectors.files}


def near(got, want, tolerance=5e-6):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def cplx(x):
    return x[..., 0] + 1j * x[..., 1]


# ---------------------------------------------------------------------- independent references
@pytest.mark.parametrize("mode", ["conv", "recurrent"])
@pytest.mark.parametrize("name", ["s4d_lin_zoh", "s4d_inv_bilinear"])
def test_s4d_outputs_and_gradients_of_the_reference(name, mode):
    vectors = load(name)
    config = json.loads(str(vectors["meta"]))["config"]
    mixer = S4D(
        config["H"], d_state=2 * config["n_half"], init=config["init"], discretization=config["disc"],
        activation=None, output=None, mode=mode,
    )  # fmt: skip
    start = mixer.A_imag.numpy().copy()
    mixer.load_state_dict({key[2:]: x for key, x in vectors.items() if key.startswith("w.")})
    near(start, mixer.A_imag.numpy())  # the same initial poles
    near(mixer.kernel(config["L"]).numpy()[0], vectors["out.K"])
    x = xc.Tensor(vectors["in.u"].transpose(0, 2, 1), requires_grad=True)
    y, _ = mixer(x)
    near(y.numpy().transpose(0, 2, 1), vectors["out.y"])
    y.backward(vectors["cot.y"].transpose(0, 2, 1))
    near(x.grad.transpose(0, 2, 1), vectors["gin.u"])
    for path, parameter in mixer.named_parameters():
        near(parameter.grad, vectors[f"gw.{path}"], 2e-5)


def published_parameters(vectors):
    """Names of the published kernels to our arguments, all as Tensors with gradients."""
    given = {key[6:]: xc.Tensor(x, requires_grad=True) for key, x in vectors.items() if key.startswith("param.")}
    system = [given["inv_dt"][:, 0], -xc.ops.exp(given["A_real"]), -given["A_imag"], given["B"][0], given["C"]]
    return given, system + ([given["P"][0]] if "P" in given else [])


@pytest.mark.parametrize("name", ["s4_dplr", "s4d_zoh", "s4d_bilinear"])
def test_kernels_and_gradients_of_the_published_code(name):
    vectors = load(f"upstream/{name}")
    given, system = published_parameters(vectors)
    length = vectors["out.K"].shape[-1]
    if name == "s4_dplr":
        k = xc.ops.s4_kernel(*system, length=length)
    else:
        k = xc.ops.s4d_kernel(*system, length=length, discretization=name[4:])
    near(k.numpy(), vectors["out.K"])
    k.backward(vectors["dout.K"])
    for path, tensor in given.items():
        near(tensor.grad, vectors[f"grad.{path}"], 2e-5)


@pytest.mark.parametrize("name", ["s4_dplr", "s4d_zoh", "s4d_bilinear"])
def test_steps_of_the_published_code(name):
    vectors = load(f"upstream/{name}")
    steps, x = vectors["out.step_y"][0].transpose(2, 0, 1), vectors["in.u"].transpose(0, 2, 1)
    if name == "s4_dplr":
        mixer = S4(3, d_state=16, channels=2)
        parameters = {key[6:]: value for key, value in vectors.items() if key.startswith("param.")}
        mixer.load_published(parameters, l_kernel=24)
        y, _ = xc.ops.linear_state_scan(x, *mixer.system())
        near(mixer.kernel(24).numpy(), vectors["out.K"])
    else:
        y, _ = xc.ops.linear_state_scan(
            x, *published_parameters(vectors)[1], None, discretization=name[4:]
        )
    near(y.numpy()[0], steps)


def test_hippo_legs_of_the_published_code():
    vectors = load("upstream/s4_legs_nplr_N16")
    poles, low_rank, enter = hippo.legs_normal_plus_low_rank(16, clip=2)
    near(poles, vectors["W"])
    phase = low_rank / vectors["P"][0]  # an eigenvector is known up to a phase
    near(np.abs(phase), np.ones(8))
    near(enter / vectors["B"], phase)


def dense(vectors, length, dt):
    a, b, c = (vectors[key].astype(float) for key in ("w.A", "w.B", "w.C"))
    one = np.eye(len(a))
    step = np.linalg.solve(one - dt / 2 * a, one + dt / 2 * a)
    enter = np.linalg.solve(one - dt / 2 * a, dt * b)
    return np.array([c @ np.linalg.matrix_power(step, n) @ enter for n in range(length)])


@pytest.mark.parametrize("length", [40, 17])
def test_s4_is_the_dense_legs_system(length):
    vectors = load("s4_dplr_legs")
    dt = json.loads(str(vectors["meta"]))["config"]["dt"]
    mixer = S4(1, d_state=8, activation=None, output=None)
    poles, p, b, c = (vectors[f"w.half.{key}"] for key in ("Lambda", "P", "B", "C"))
    pairs = {key: np.stack([z.real, z.imag], -1)[None, None] for key, z in (("P", p), ("B", b), ("C", c))}
    mixer.load_state_dict({
        "inv_dt": np.log([[dt]]), "A_real": np.log(-poles.real)[None], "A_imag": -poles.imag[None],
        "D": np.zeros((1, 1)), **pairs,
    })  # fmt: skip
    near(dense(vectors, 40, dt), vectors["out.K_bilinear"])
    near(mixer.kernel(length).numpy()[0, 0], vectors["out.K_bilinear"][:length])
    impulse = np.eye(1, length)[:, :, None].astype(np.float32)
    near(mixer(xc.Tensor(impulse))[0].numpy()[0, :, 0], vectors["out.K_bilinear"][:length])


# ---------------------------------------------------------------------- in float64, from the definition
def naive(mixer, x):
    """The dense system of each feature in complex128, one token at a time."""
    log_dt, a_real, a_imag, b, c, p = (None if v is None else v.numpy() for v in mixer.system())
    y = np.zeros((*x.shape[:2], len(c), x.shape[2]))
    for h in range(x.shape[2]):
        def both(z):
            return np.concatenate([z, z.conj()])

        a, dt = both(a_real[h] + 1j * a_imag[h]), np.exp(log_dt[h])
        full = np.diag(a)
        enter = np.ones(len(a), complex) if b is None else both(cplx(b[h]))
        if p is not None:
            full = full - np.outer(both(cplx(p[h])), both(cplx(p[h])).conj())
        one = np.eye(len(a))
        if mixer.discretization == "zoh":
            step, enter = np.diag(np.exp(dt * a)), np.expm1(dt * a) / a * enter
        else:
            step = np.linalg.solve(one - dt / 2 * full, one + dt / 2 * full)
            enter = np.linalg.solve(one - dt / 2 * full, dt * enter)
        state = np.zeros((len(x), len(a)), complex)
        for t in range(x.shape[1]):
            state = state @ step.T + enter * x[:, t, h, None]
            for k in range(len(c)):
                y[:, t, k, h] = (state @ both(cplx(c[k, h]))).real
    return y


CASES = {
    "s4": (S4, {}),
    "s4 channels": (S4, {"channels": 2}),
    "lin zoh": (S4D, {"init": "lin"}),
    "inv bilinear": (S4D, {"init": "inv", "discretization": "bilinear", "channels": 2}),
    "legs bilinear": (S4D, {"init": "legs", "discretization": "bilinear"}),
    "real zoh": (S4D, {"init": "S4D-Real"}),
}


@pytest.mark.parametrize("mode", ["conv", "recurrent"])
@pytest.mark.parametrize("length", [1, 2, 50, 129])
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_dense_system(case, length, mode):
    kind, fields = CASES[case]
    mixer = kind(3, d_state=16, mode=mode, **fields).to_dtype(np.float64)
    x = np.random.default_rng(0).standard_normal((2, length, 3))
    with xc.no_grad():
        y, _ = mixer._response(xc.Tensor(x), None)
        want = naive(mixer, x)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-10, atol=1e-10)


def test_the_pole_free_form_is_exact_at_every_node_of_a_slow_system():
    """Where the usual form divides by zero (w = -1), and where A dt almost vanishes."""
    mixer = S4(2, d_state=32, dt_min=1e-6, dt_max=1e-5).to_dtype(np.float64)
    x = np.random.default_rng(0).standard_normal((1, 64, 2))
    conv = S4(2, d_state=32, mode="conv").to_dtype(np.float64)
    conv.load_state_dict(mixer.state_dict())
    with xc.no_grad():
        one, two = (m._response(xc.Tensor(x), None)[0].numpy() for m in (mixer, conv))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-10 * np.abs(one).max())


@pytest.mark.parametrize("case", ["s4 channels", "lin zoh", "inv bilinear"])
def test_both_modes_have_the_same_gradients(case):
    kind, fields = CASES[case]
    x = np.random.default_rng(0).standard_normal((2, 12, 3))
    grads = []
    for mode in ("conv", "recurrent"):
        mixer = kind(3, d_state=8, mode=mode, rng=np.random.default_rng(1), **fields).to_dtype(np.float64)
        tensor = xc.Tensor(x, requires_grad=True)
        start = xc.Tensor(np.random.default_rng(2).standard_normal((2, 3, 4, 2)), requires_grad=True)
        y, (h,) = mixer(tensor, (start,))
        ((y * y).sum() + (h * h).sum()).backward()
        grads.append([tensor.grad, start.grad] + [parameter.grad for parameter in mixer.parameters()])
    for one, two in zip(*grads):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-9)


def test_legs_is_normal_after_adding_the_low_rank_term():
    a, b, p = hippo.legs(12)
    normal = a + np.outer(p, p)
    np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=1e-10)
    poles, low_rank, enter = hippo.legs_normal_plus_low_rank(12)
    both = np.concatenate([low_rank, low_rank.conj()])
    full = np.diag(np.concatenate([poles, poles.conj()])) - np.outer(both, both.conj())
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(full)), np.sort(np.linalg.eigvals(a + 0j)), atol=1e-3)
    np.testing.assert_allclose(np.poly(full), np.poly(a), rtol=1e-8)
    np.testing.assert_allclose(2 * (np.abs(enter) ** 2).sum(), b @ b)


def test_diagonal_starts_follow_their_formulas():
    n = np.arange(4)
    np.testing.assert_allclose(hippo.diagonal("lin", 8), -0.5 + 1j * np.pi * n)
    np.testing.assert_allclose(hippo.diagonal("S4D-Inv", 8), -0.5 + 1j * 8 / np.pi * (8 / (2 * n + 1) - 1))
    np.testing.assert_allclose(hippo.diagonal("real", 8), -(n + 1.0))
    assert (hippo.diagonal("legs", 8).imag > 0).all()


@pytest.mark.parametrize(
    "kind, fields",
    [(S4, {"d_state": 7}), (S4, {"discretization": "zoh"}), (S4D, {"init": "fast"}), (S4D, {"output": "sum"}),
     (S4D, {"activation": "tan"}), (S4D, {"mode": "fft"}), (S4, {"channels": 2, "output": None}),
     (S4D, {"dt_min": 0.0}), (S4D, {"d_stat": 4}), (S4D, {"discretization": "euler"})],
)  # fmt: skip
def test_impossible_configurations_are_refused(kind, fields):
    with pytest.raises(ConfigError):
        kind(4, **fields)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="log_dt"):
        xc.ops.s4d_kernel(np.zeros(2), -np.ones((3, 2)), np.zeros((3, 2)), None, np.zeros((1, 3, 2, 2)), length=4)
    with pytest.raises(ShapeError, match="expected"):
        xc.ops.fft_conv(np.zeros((1, 4, 3)), np.zeros((1, 2, 4)))


@pytest.mark.parametrize("n", [1, 2, 7, 31, 97, 1000, 4097])
def test_transforms_have_lengths_of_small_factors(n):
    from xuracore.ops.linear_state import fast_length

    found = fast_length(n)
    rest = found
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    assert rest == 1 and n <= found <= max(2, 1.2 * n)
