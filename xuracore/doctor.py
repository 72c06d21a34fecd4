"""What this machine and installation offer the engine: ``python -m xuracore doctor``."""

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path

import numpy as np

from xuracore import jit, threads
from xuracore._version import __version__
from xuracore.kernels.activation import sigmoid_forward
from xuracore.warmup import load_kernels

_VECTOR_UNITS = ("avx512f", "avx2", "fma", "avx", "asimd", "sse4_2")


def examine():
    """``(facts, notes)``: facts is a dict of lines to print, notes a list of what could be better."""
    notes = []
    facts = {
        "xura": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": _packages(),
        "processor": _processor(),
        "threads": _threads(notes),
        "blas": _blas(notes),
    }
    facts |= _kernels(notes)
    return facts, notes


def _packages():
    versions = []
    for name in ("numpy", "numba", "llvmlite", "pillow"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} is not installed")
    return ", ".join(versions)


def _processor():
    try:
        fields = dict(
            map(str.strip, line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
            if ":" in line
        )
    except OSError:
        fields = {}
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    units = ", ".join(unit for unit in _VECTOR_UNITS if unit in flags)
    return f"{model}; {units or 'vector units unknown'}"


def _threads(notes):
    asked = os.environ.get("XURA_NUM_THREADS")
    chosen = f" (XURA_NUM_THREADS={asked})" if asked else ""
    usable, quota = threads.available_cpus(), threads._cgroup_quota()
    limit = f", a container's quota allows {quota}" if quota else ""
    count = threads.get_num_threads()
    if asked and int(asked) > usable:
        notes.append(f"XURA_NUM_THREADS={asked} is more than the {usable} usable processors")
    return f"{count}{chosen}; {usable} of {os.cpu_count()} processors are usable{limit}"


def _blas(notes):
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    count = threads.blas_threads()
    if count is None:
        notes.append("the threads of this BLAS cannot be set from here; use its own environment variable")
        return f"{blas.get('name')} {blas.get('version')}"
    if count > threads.get_num_threads():
        notes.append(f"BLAS uses {count} threads, the kernels {threads.get_num_threads()}: set XURA_NUM_THREADS")
    return f"{blas.get('name')} {blas.get('version')}, {count} threads"


def _kernels(notes):
    names = load_kernels()
    if jit.backend() == "numpy":
        if os.environ.get("XURA_KERNELS"):
            notes.append(f"XURA_KERNELS={os.environ['XURA_KERNELS']}: kernels run as NumPy, which is slower")
        else:
            notes.append("Numba is not installed: kernels run as NumPy, which is slower; pip install numba")
        return {"kernels": f"{len(names)}, run by their NumPy twins"}
    if jit.backend() == "python":
        notes.append("NUMBA_DISABLE_JIT is set: kernels run as plain Python, a hundred times slower")
        return {"kernels": f"{len(names)}, run as plain Python"}
    directory = jit.cache_directory()
    if directory is None or not _writable(directory):
        notes.append("compiled kernels cannot be kept: set NUMBA_CACHE_DIR to a folder of yours")
    width = _vector_bits()
    if width < 256:
        notes.append(f"kernels use vectors of {width} bits only; see NUMBA_CPU_NAME and NUMBA_CPU_FEATURES")
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    return {
        "kernels": f"{len(names)}, compiled by Numba; vectors of {width} bits",
        "kernel threads": f"Python threads without the GIL; OMP_WAIT_POLICY is {policy}",
        "kernel cache": _cache(directory),
    }


def _vector_bits():
    """Width of the vector registers in what the compiler emits for a kernel here; 64 for scalar code."""
    arrays = np.ones(8, np.float32), np.ones(8, np.float32)
    sigmoid_forward(*arrays)
    code = jit.assembly(sigmoid_forward, sigmoid_forward.compiled().signatures[0])
    for register, bits in (("%zmm", 512), ("%ymm", 256), ("mulps", 128), (".4s", 128)):
        if register in code:
            return bits
    return 64


def _cache(directory):
    if directory is None:
        return "none"
    files = list(Path(directory).glob("*.nb[ci]"))
    size = sum(file.stat().st_size for file in files) / 2**20
    return f"{directory}, {len(files)} files, {size:.1f} MiB"


def _writable(directory):
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
