"""Arrays that come and go are not mapped anew each time, unless the user wants it so."""

import os
import subprocess
import sys

import numpy as np
import pytest

from xuracore import allocator

FAULTS = """
import resource
import numpy as np
import xuracore
def twice():
    a = np.ones(1_000_000, np.float32)
    b = a + 1
for _ in range(3):
    twice()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    twice()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "XURA_NO_ENV")
    kept = {key: value for key, value in os.environ.items() if key not in own}
    result = subprocess.run([sys.executable, "-c", FAULTS], env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux") or "GLIBC" not in os.confstr("CS_GNU_LIBC_VERSION").upper(),
                    reason="needs glibc")
def test_memory_is_kept_unless_the_user_set_limits():
    assert faults() < 500  # twenty times two arrays of 977 pages are 39 000
    assert faults(MALLOC_TRIM_THRESHOLD_="100000", MALLOC_MMAP_THRESHOLD_="100000") > 20_000


def test_arrays_on_huge_pages_keep_their_numbers(monkeypatch):
    arrays = [np.full(size, size % 256, np.uint8) for size in (1, 1 << 20, 5 << 20)]
    assert allocator.lay_on_huge_pages(arrays) <= 2  # none where the system has no such pages
    for array in arrays:
        assert (array == array.size % 256).all()
    monkeypatch.setenv("XURA_NO_ENV", "1")
    assert allocator.lay_on_huge_pages(arrays) == 0
