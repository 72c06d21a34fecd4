"""Products of a stored matrix with one vector or a few: y = x Wᵀ, every weight read once.

A matrix W (rows, K) is stored in one of four ways; ``scales`` has size 0 in the first two.

    float32   weight (rows, K)
    uint16    weight (rows, K), the bits of bfloat16
    int8      weight (panels, K, 32), scales (panels, K / 32, 32):   W = scale q,   -127 ≤ q ≤ 127
    uint8     weight (panels, K, 16), the same scales: byte r of a panel holds q + 8 of row r in its
              low and of row r + 16 in its high four bits,   -7 ≤ q ≤ 7

A panel is 32 rows side by side, so that one load holds one column of many rows: x[k] times a vector
needs no sum across lanes.  A scale, bfloat16 bits, belongs to 32 consecutive columns of one row.  Rows
beyond the last are zero.  x is (B, K), y is (B, rows), both float32; :func:`product` computes the rows
``first`` to ``last`` from the columns ``low`` to ``high``, always in the same order.  For panels first,
low and high are multiples of 32.
"""

import numpy as np

from xuracore.jit import REDUCE, device, kernel, prange

PANEL = GROUP = 32
HALF = PANEL // 2
ZERO, BITS = np.float32(0), np.uint32(16)
SUM = ("contract", "reassoc")  # flags of the sums in a panel


@device
def widen(bits):
    """float32 of bfloat16 bits."""
    return np.uint32(np.uint32(bits) << BITS).view(np.float32)


def dequantised(weight, scales):
    """The stored matrix as float32 (rows, K); panels are unpacked with their rows of padding."""
    if weight.dtype == np.float32:
        return weight
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << BITS).view(np.float32)
    if weight.dtype == np.uint8:
        weight = np.concatenate([weight & 15, weight >> 4], axis=2).astype(np.int8) - np.int8(8)
    wide = (scales.astype(np.uint32) << BITS).view(np.float32)
    whole = weight * np.repeat(wide, weight.shape[1] // scales.shape[1], axis=1)
    return whole.swapaxes(1, 2).reshape(-1, weight.shape[1])


def _write_prefetch(ir, builder, array, first, last):
    """One instruction for each 64 bytes, into the second-level cache."""
    byte, whole, flag = ir.IntType(8), ir.IntType(64), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
    fetch = builder.module.globals.get("llvm.prefetch.p0i8") or ir.Function(builder.module, kind, "llvm.prefetch.p0i8")
    start, stop = (builder.ptrtoint(builder.gep(array, [index]), whole) for index in (first, last))
    before, loop, after = builder.block, builder.append_basic_block("fetch"), builder.append_basic_block("fetched")
    builder.cbranch(builder.icmp_unsigned("<", start, stop), loop, after)
    builder.position_at_end(loop)
    place = builder.phi(whole)
    place.add_incoming(start, before)
    flags = [ir.Constant(flag, value) for value in (0, 2, 1)]  # for reading, second level, data
    builder.call(fetch, [builder.inttoptr(place, byte.as_pointer()), *flags])
    following = builder.add(place, ir.Constant(whole, 64))
    place.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, stop), loop, after)
    builder.position_at_end(after)


@device.written_by(_write_prefetch)
def prefetch(array, first, last):
    """Ask for elements ``first`` to ``last`` of a flat view of ``array``; changes nothing but the time."""


AHEAD = 6  # rows that are asked for beforehand where only a piece of each is read


def _product_of_bfloat16(weight, scales, x, low, high, first, last, y):
    for r in range(first, last):
        if high - low < weight.shape[1] and r + AHEAD < last:
            prefetch(weight[r + AHEAD], low, high)
        row = weight[r, low:high]
        for b in range(x.shape[0]):
            column, total = x[b, low:high], ZERO
            for k in range(high - low):
                total += widen(row[k]) * column[k]
            y[b, r] = total


def _panel_numpy(weight, scales, x, low, high, out):
    columns = dequantised(weight[None], scales[None])[:, low:high]
    out[...] = columns @ x[low:high]


def _write_panel(ir, builder, four_bits, weight, scales, x, low, high, out):
    """Vectors of 16 rows: one loop over the groups of 32 columns, which are unrolled."""
    byte, whole, number = ir.IntType(8), ir.IntType(64), ir.FloatType()
    bytes_16, halves_16 = ir.VectorType(byte, HALF), ir.VectorType(ir.IntType(16), HALF)
    ints_16, floats_16 = ir.VectorType(ir.IntType(32), HALF), ir.VectorType(number, HALF)
    zero = ir.Constant(floats_16, [0.0] * HALF)

    def every(value, kind=ir.IntType(32)):
        return ir.Constant(ir.VectorType(kind, HALF), [value] * HALF)

    def load(pointer, offset, kind, align):
        place = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
        return builder.load(place, align=align)

    def at(offset, step):
        return builder.add(offset, ir.Constant(whole, step))

    def fused(a, b, c):
        return builder.fadd(builder.fmul(a, b, flags=SUM), c, flags=SUM)

    before = builder.block
    loop, after = builder.append_basic_block("groups"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", low, high), loop, after)
    builder.position_at_end(loop)
    start, sums = builder.phi(whole), [builder.phi(floats_16) for _ in range(2)]
    for phi, value in zip((start, *sums), (low, zero, zero)):
        phi.add_incoming(value, before)
    inner = [[zero, zero], [zero, zero]]  # of each half, for even and for odd columns
    place = builder.mul(start, ir.Constant(whole, HALF if four_bits else PANEL))
    for k in range(GROUP):
        lane = builder.insert_element(
            ir.Constant(floats_16, ir.Undefined), load(x, at(start, k), number, 4),
            ir.Constant(ir.IntType(32), 0),
        )  # fmt: skip
        factor = builder.shuffle_vector(lane, ir.Constant(floats_16, ir.Undefined), every(0))
        if four_bits:
            pair = builder.zext(load(weight, at(place, k * HALF), bytes_16, 1), ints_16)
            halves = builder.and_(pair, every(15)), builder.lshr(pair, every(4))
            halves = [builder.sub(half, every(8)) for half in halves]
        else:
            places = at(place, k * PANEL), at(place, k * PANEL + HALF)
            halves = [builder.sext(load(weight, p, bytes_16, 1), ints_16) for p in places]
        for half, value in enumerate(halves):
            wide = builder.sitofp(value, floats_16)
            inner[half][k % 2] = fused(wide, factor, inner[half][k % 2])
    for half in range(2):
        bits = builder.zext(load(scales, at(start, half * HALF), halves_16, 2), ints_16)
        scale = builder.bitcast(builder.shl(bits, every(16)), floats_16)
        total = fused(scale, builder.fadd(*inner[half], flags=SUM), sums[half])
        sums[half].add_incoming(total, loop)
        inner[half] = total
    following = at(start, GROUP)
    start.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, high), loop, after)
    builder.position_at_end(after)
    results = [builder.phi(floats_16) for _ in range(2)]
    for half, result in enumerate(results):
        result.add_incoming(zero, before)
        result.add_incoming(inner[half], loop)
    for half, result in enumerate(results):
        target = builder.gep(out, [ir.Constant(whole, half * HALF)])
        builder.store(result, builder.bitcast(target, floats_16.as_pointer()), align=4)


def _write_int8(ir, builder, *arguments):
    _write_panel(ir, builder, False, *arguments)


def _write_int4(ir, builder, *arguments):
    _write_panel(ir, builder, True, *arguments)


@device.written_by(_write_int8)
def panel_of_int8(weight, scales, x, low, high, out):
    """out (32) = W[:, low:high] x[low:high] of one panel: weight (K, 32), scales (K / 32, 32), x (K)."""
    _panel_numpy(weight, scales, x, low, high, out)


@device.written_by(_write_int4)
def panel_of_int4(weight, scales, x, low, high, out):
    """The same with weight (K, 16), two rows a byte."""
    _panel_numpy(weight, scales, x, low, high, out)


def _product_of_int8(weight, scales, x, low, high, first, last, y):
    out = np.empty(PANEL, np.float32)
    panels = (last + PANEL - 1) // PANEL
    for p in range(first // PANEL, panels):
        if high - low < weight.shape[1] and p + 1 < panels:
            prefetch(weight[p + 1], low * PANEL, high * PANEL)
        for b in range(x.shape[0]):
            panel_of_int8(weight[p], scales[p], x[b], low, high, out)
            y[b, p * PANEL : min(p * PANEL + PANEL, last)] = out[: min(PANEL, last - p * PANEL)]


def _product_of_int4(weight, scales, x, low, high, first, last, y):
    out = np.empty(PANEL, np.float32)
    panels = (last + PANEL - 1) // PANEL
    for p in range(first // PANEL, panels):
        if high - low < weight.shape[1] and p + 1 < panels:
            prefetch(weight[p + 1], low * HALF, high * HALF)
        for b in range(x.shape[0]):
            panel_of_int4(weight[p], scales[p], x[b], low, high, out)
            y[b, p * PANEL : min(p * PANEL + PANEL, last)] = out[: min(PANEL, last - p * PANEL)]


@device.of_arrays(uint16=_product_of_bfloat16, int8=_product_of_int8, uint8=_product_of_int4)
def product(weight, scales, x, low, high, first, last, y):
    """``y[:, first:last] = x[:, low:high] @ W[first:last, low:high].T``, inside kernels."""
    for r in range(first, last):
        if high - low < weight.shape[1] and r + AHEAD < last:
            prefetch(weight[r + AHEAD], low, high)
        row = weight[r, low:high]
        for b in range(x.shape[0]):
            column, total = x[b, low:high], ZERO
            for k in range(high - low):
                total += row[k] * column[k]
            y[b, r] = total


def gemv_numpy(weight, scales, bias, x, tasks, y):
    y[...] = x @ dequantised(weight, scales)[: y.shape[1]].T + bias


@kernel(twin=gemv_numpy, parallel=True, fastmath=REDUCE)
def gemv(weight, scales, bias, x, tasks, y):
    """y (B, rows) = x (B, K) Wᵀ + bias (rows), in ``tasks`` runs of rows."""
    rows = y.shape[1]
    panels = (rows + PANEL - 1) // PANEL
    for index in prange(tasks):
        task = np.int64(index)
        first = panels * task // tasks * PANEL
        last = min(panels * (task + 1) // tasks * PANEL, rows)
        product(weight, scales, x, 0, x.shape[1], first, last, y)
        for b in range(x.shape[0]):
            for r in range(first, last):
                y[b, r] += bias[r]
