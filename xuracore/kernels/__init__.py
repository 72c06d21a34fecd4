"""Numba kernels on plain arrays, each beside its NumPy twin.  No Tensor here."""
