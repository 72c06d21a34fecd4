"""OpenBLAS gets the vectors the processor has: before or after NumPy, and never against the user's word."""

import json
import os
import platform
import subprocess
import sys

import pytest

from xuracore import blas

SHOW = """
import json, os
import numpy as np
a = np.random.default_rng(0).standard_normal((70, 130), np.float32)
before = a @ a.T
import xuracore
from xuracore import blas
after = a @ a.T
print(json.dumps([[blas.core_name(path) for path in blas.libraries()], float(abs(after - before).max()),
                  dict(os.environ).get("OPENBLAS_CORETYPE")]))
"""

pytestmark = pytest.mark.skipif(not blas.libraries() or platform.machine() != "x86_64",
                                reason="not OpenBLAS on x86-64")


def shown(**environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("OPENBLAS_CORETYPE", "XURA_NO_ENV")}
    result = subprocess.run([sys.executable, "-c", SHOW], env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_processor_with_wide_vectors_does_not_multiply_with_narrow_ones():
    names, difference, left_behind = shown()
    assert names and difference < 1e-4 and left_behind is None
    if blas.has_avx512() and sys.platform.startswith("linux"):
        assert not set(names) & blas.NARROW


def test_the_users_choice_stays():
    names, difference, left_behind = shown(OPENBLAS_CORETYPE="Haswell")
    assert set(names) <= {"Haswell", "Zen"} and difference == 0 and left_behind == "Haswell"
    untouched, difference, _ = shown(XURA_NO_ENV="1")
    assert untouched and difference == 0


def test_flags_are_read_from_the_first_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 " + " ".join(sorted(blas.NEEDED)) + "\n")
    assert blas.has_avx512(file)
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n")
    assert not blas.has_avx512(file) and not blas.has_avx512(tmp_path / "absent")
    file.write_text("7f00-7f01 r-xp 00000000 fe:00 17   /x y/libopenblas.so\n7f02-7f03 r--p 0 fe:00 1 /libc.so\n")
    assert blas.libraries(file) in ([], ["/x y/libopenblas.so"])
