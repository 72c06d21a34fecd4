"""The laws of the profile: what is counted, where it is drawn, and that nothing stays behind."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import xuracore as xc
from xuracore import __main__, bench, jit, nn, ops
from xuracore.ops import registry
from xuracore.profile_page import spans
from xuracore.profiler import profile


class Block(nn.Module):
    def __init__(self, width, rng):
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width, rng=rng)

    def forward(self, x):
        return x + ops.gelu(self.inner(self.norm(x)))


class Model(nn.Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.blocks = nn.ModuleList(Block(8, rng) for _ in range(2))
        self.head = nn.Linear(8, 3, rng=rng)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATHS = ["Model", *(f"Model.blocks.{i}{name}" for i in "01" for name in ("", ".norm", ".inner")), "Model.head"]


def step(model, x):
    (model(x) * 2.0).sum().backward()
    model.zero_grad()


@pytest.fixture(scope="module", params=[False, True], ids=["by caller", "by model"])
def found(request):
    model, x = Model(), np.ones((4, 8), np.float32)
    step(model, x)
    with xc.profile(model if request.param else None) as result:
        step(model, x)
        step(model, x)
    return result


def test_every_op_is_counted_forward_and_backward(found):
    table = found.by_op()
    for name, calls in {"linear": 6, "gelu": 4, "layer_norm": 4, "add": 4, "multiply": 2, "sum": 2}.items():
        row = table[name]
        assert row["calls"] == row["vjps"] == calls and row["forward"] > 0 and row["backward"] > 0
    assert table["linear"]["allocated"] >= 2 * (4 * 8 * 4 * 2 + 4 * 3 * 4)
    assert table["add"]["saved"] == 0 and table["linear"]["saved"] >= 2 * 2 * (8 * 8 + 4 * 8) * 4
    times = [row["forward"] + row["backward"] for row in table.values()]
    assert times == sorted(times, reverse=True)
    assert sum(times) / 1e9 < found.seconds
    assert all(0 <= row["kernel"] <= row["forward"] + row["backward"] for row in table.values())
    if jit.backend() == "numba":
        assert table["gelu"]["kernel"] > 0


def test_modules_are_named_by_path_and_get_their_backward(found):
    modules = found.by_module()
    assert list(modules) == PATHS
    assert all(forward > 0 and backward > 0 for forward, backward in modules.values())
    for i in (0, 1):
        assert modules["Model"][i] > modules["Model.blocks.0"][i] > modules["Model.blocks.0.inner"][i]


def test_memory_ends_where_it_began(found):
    assert found.memory[-1][1] == 0 and found.peak > 4 * 8 * 4
    assert found.peak == max(live for _, live in found.memory)


def test_the_picture_is_well_formed_and_nothing_leaves_its_place(found, tmp_path):
    found.svg(tmp_path / "p.svg")
    found.page(tmp_path / "p.html")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        if rect.get("width") != "100%":
            assert 0 <= float(rect.get("x")) and float(rect.get("x")) + float(rect.get("width")) <= width
            assert float(rect.get("y")) + float(rect.get("height")) <= height
    text = " ".join(t.text for t in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "Model" in text and "MB" in text and "head" in text
    page = (tmp_path / "p.html").read_text("utf-8")
    assert "layer_norm" in page and not re.search(r"(src|href)=|url\(|<script", page)


def test_spans_lie_inside_those_above_them(found):
    drawn, phases = spans(found)
    assert [phase for *_, phase in phases][:2] == ["forward", "backward"]
    for side in ("module", "module backward"):
        own = [s for s in drawn if s[5] == side]
        assert {s[6] for s in own} == set(PATHS)
        for depth, start, end, *_ in own:
            assert start <= end
            assert not depth or any(d == depth - 1 and a <= start and end <= b for d, a, b, *_ in own)


def test_the_trace_is_json_that_tells_the_same(found, tmp_path):
    found.chrome_trace(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    whole = [e for e in events if e["ph"] == "X"]
    assert len(whole) == len(found.events) and {e["cat"] for e in whole} >= {"forward", "backward", "module"}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and e["tid"] == 0 for e in whole)
    assert [e for e in events if e["ph"] == "C"]


def test_the_table_is_text(found):
    lines = found.table(rows=2).splitlines()
    assert lines[0].split()[:3] == ["op", "calls", "forward"] and len(lines[0]) == len(lines[1])
    assert re.search(r"ms, of which .* in ops and .* in kernels; at most .* MB", lines[-1])


def test_other_threads_are_seen_and_nothing_stays_behind():
    call, kernel = nn.Module.__call__, dict(vars(jit.Kernel))
    with pytest.raises(ZeroDivisionError), profile() as found:
        thread = threading.Thread(target=lambda: step(Model(), np.ones((1, 8), np.float32)))
        thread.start()
        thread.join()
        _ = 1 / 0
    assert found.by_op()["linear"]["calls"] == 3 and "Model.head" in found.by_module()
    assert nn.Module.__call__ is call and dict(vars(jit.Kernel)) == kernel
    assert not registry._instruments and all(r.forward is r.bare[0] for r in registry.REGISTRY.values())


def test_profiles_and_anomaly_detection_work_together():
    x = xc.tensor([0.0, 1.0], requires_grad=True)
    with xc.profile() as found, xc.detect_anomaly(), np.errstate(all="ignore"):
        with pytest.raises(xc.autograd.GradError, match="y = ops.sqrt"):
            y = ops.sqrt(x)
            y.sum().backward()
    assert found.by_op()["sqrt"]["calls"] == 1


def test_nothing_recorded_is_an_empty_picture(tmp_path):
    with profile() as found:
        pass
    found.page(tmp_path / "p.html")
    assert found.by_op() == {} and found.peak == 0


def test_kernels_of_an_optimizer_are_drawn_between_the_steps():
    rng = np.random.default_rng(0)
    network = bench.Network(12, 8, 3, rng=rng)
    step = bench.training_step(network, *bench.digits(rng, 5, 12, 3))
    step()
    with profile() as found:
        step()
    drawn = [s[3] for s in spans(found)[0]]
    assert drawn.count("adamw_update") == len(list(network.parameters()))
    assert "relu" in drawn and not any(name.startswith("cross_entropy_") for name in drawn)


def test_the_bench_compares_equal_work():
    rng = np.random.default_rng(0)
    network, data = bench.Network(12, 8, 3, rng=rng), bench.digits(rng, 5, 12, 3)
    by_hand, ours = bench.numpy_training_step(network, *data), bench.training_step(network, *data)
    np.testing.assert_allclose([ours() for _ in range(3)][0], by_hand(), rtol=1e-5)


# ---------------------------------------------------------------------- commands
def run(*arguments, cwd):
    command = [sys.executable, "-m", "xuracore", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(xc.__file__).parent.parent), "XURA_KERNELS": "numpy"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_a_script_is_profiled_with_its_arguments(tmp_path):
    (tmp_path / "helper.py").write_text("import xuracore as xc\ndef work(): xc.ops.exp(xc.tensor([1.0]))\n")
    (tmp_path / "s.py").write_text("import sys, helper\nhelper.work()\nprint(sys.argv[1:])\nsys.exit(3)\n")
    result = run("profile", "--trace", "t.json", "s.py", "--out", "mine", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert "['--out', 'mine']" in result.stdout and "exp" in result.stdout
    assert (tmp_path / "profile.html").exists() and json.loads((tmp_path / "t.json").read_text())
    result = run("profile", "helper:work", cwd=tmp_path)
    assert result.returncode == 0 and "exp" in result.stdout, result.stderr
    for target in ("nowhere.py", "helper:nothing"):
        result = run("profile", target, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_the_table_of_ops_is_a_command(capsys, monkeypatch):
    monkeypatch.setattr(__main__, "op_table", lambda: "| op |")
    assert __main__.main(["ops"]) == 0
    assert capsys.readouterr().out == "| op |\n"
