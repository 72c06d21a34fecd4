"""What this machine and installation offer the engine: ``python -m xuracore doctor``."""

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path

import numpy as np

from xuracore import jit, threads
from xuracore._version import __version__
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
        "threads": _threads(),
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


def _threads():
    asked = os.environ.get("XURA_NUM_THREADS")
    chosen = f" (XURA_NUM_THREADS={asked})" if asked else ""
    usable = threads.available_cpus()
    return f"{threads.get_num_threads()}{chosen}; {usable} of {os.cpu_count()} processors are usable"


def _blas(notes):
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    if not threads.blas_is_controlled():
        notes.append("the threads of this BLAS cannot be set from here; use its own environment variable")
    return f"{blas.get('name')} {blas.get('version')}"


def _kernels(notes):
    names = load_kernels()
    if jit.backend() == "numpy":
        if os.environ.get("XURA_KERNELS"):
            notes.append(f"XURA_KERNELS={os.environ['XURA_KERNELS']}: kernels run as NumPy, which is slower")
        else:
            notes.append("Numba is not installed: kernels run as NumPy, which is slower; pip install numba")
        return {"kernels": f"{len(names)}, run by their NumPy twins"}
    directory = jit.cache_directory()
    if directory is None or not _writable(directory):
        notes.append("compiled kernels cannot be kept: set NUMBA_CACHE_DIR to a folder of yours")
    return {
        "kernels": f"{len(names)}, compiled by Numba",
        "kernel cache": str(directory or "none"),
    }


def _writable(directory):
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
