"""Cut the last axis into contiguous pieces."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.registry import primitive


def _unpack_forward(x, *, sizes):
    """Cut the last axis into contiguous pieces of the given sizes; one copy forward, one backward.

    Slicing would give each piece's gradient an array of the size of the whole.
    """
    if sum(sizes) != x.shape[-1]:
        raise ShapeError(f"sizes {tuple(sizes)} add up to {sum(sizes)}; the last axis has {x.shape[-1]}")
    pieces = np.split(x, np.cumsum(sizes[:-1]), axis=-1)
    return tuple(np.ascontiguousarray(piece) for piece in pieces), (x.shape, sizes)


def _unpack_vjp(grad, saved, needs):
    shape, sizes = saved
    given = next(g for g in grad if g is not None)
    whole = np.empty(shape, given.dtype)
    start = 0
    for piece, size in zip(grad, sizes):
        whole[..., start : start + size] = 0 if piece is None else piece
        start += size
    return (whole,)


def _unpack_reference(x, *, sizes):
    return tuple(np.split(x, np.cumsum(sizes[:-1]), axis=-1))


def _unpack_op(count):
    def samples(rng):
        sizes = tuple(int(n) for n in rng.integers(0, 4, count))
        yield (rng.standard_normal((2, 3, sum(sizes))),), {"sizes": sizes}

    return primitive(
        f"unpack_{count}", _unpack_forward, _unpack_vjp,
        reference=_unpack_reference, samples=samples, outputs=count,
    )  # fmt: skip


unpack_2, unpack_3, unpack_8 = _unpack_op(2), _unpack_op(3), _unpack_op(8)
