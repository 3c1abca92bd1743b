"""The gradient of distance_bias: dS summed along diagonals, without a tensor of Sq x Sk and without atomics.

A program walks one diagonal of square tiles, T x T, whose corner keeps the distance n * T from its first row. In such a tile
element (r, c) has the distance n * T + c - r wherever the tile stands, so tiles are added to each other as they are and the sum
along diagonals is taken once, at the end: the upper triangle gives distances n * T + [0, T), the lower one the T before them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .schedule import SIZES
from .score_gradient import score_gradient
from .span import sees_any, sequence


@triton.jit(do_not_specialize=[*SIZES, "diagonals", "first_diagonal", "each"])
def diagonals_kernel(
    q, k, v, dout, lse, delta, partial, diagonals, first_diagonal, each,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, heads, group,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """partial (splits, heads, 2, diagonals * T): upper and lower sums of `each` sequences a split."""
    program = tl.program_id(0)
    n = program % diagonals
    h = program // diagonals % heads
    split = program // (diagonals * heads)

    acc = tl.zeros([T, T], tl.float32)
    for b in range(split * each, tl.minimum(split * each + each, batch_size)):
        s = sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT)
        for i0 in range(0, s.len_q, T):
            j0 = i0 + s.offset + (first_diagonal + n) * T
            if sees_any(s, i0, i0 + T, j0, j0 + T):
                acc += score_gradient(
                    q, k, v, dout, lse, delta, lengths, terms, dropout, s, b, h, group, i0, j0,
                    PLAIN, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, T, T,
                )  # fmt: skip

    r, c = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    skewed = tl.gather(acc, (r + c) % T, 1)  # row r turned r places to the left: distances lie in columns
    row = (split.to(tl.int64) * heads + h) * 2
    place = n * T + tl.arange(0, T)
    tl.store(partial + row * diagonals * T + place, tl.sum(tl.where(r + c < T, skewed, 0.0), 0))
    tl.store(partial + (row + 1) * diagonals * T + place, tl.sum(tl.where(r + c < T, 0.0, skewed), 0))


@triton.jit(do_not_specialize=["splits", "diagonals", "first_diagonal", "radius"])
def table_kernel(
    partial, dtable, splits, diagonals, first_diagonal, radius, heads, T: tl.constexpr, BLOCK: tl.constexpr
):
    """dtable (heads, 2 * radius + 1). Of a head's programs the first two take an end each, which gathers all that lies beyond."""
    h, part = tl.program_id(0) % heads, tl.program_id(0) // heads
    low, high = first_diagonal * T - T, (first_diagonal + diagonals) * T  # distances there are
    entry = 2 * radius
    if part == 0:
        entry, high = 0, tl.minimum(high, tl.where(radius == 0, high, 1 - radius))
    elif part == 1:
        low = tl.maximum(low, radius)
    else:
        entry = 1 + (part - 2) * BLOCK
        low = entry - radius
        high = tl.minimum(low + BLOCK, radius)

    acc = tl.zeros([BLOCK], tl.float32)
    length = diagonals * T
    for split in range(0, splits):
        upper = partial + ((split * heads + h) * 2).to(tl.int64) * length
        for distance in range(low, high, BLOCK):
            d = distance + tl.arange(0, BLOCK)
            u = d - first_diagonal * T
            acc += tl.load(upper + u, mask=(d < high) & (u >= 0) & (u < length), other=0.0)
            acc += tl.load(upper + length + u + T, mask=(d < high) & (u + T >= 0) & (u + T < length), other=0.0)
    table = dtable + h.to(tl.int64) * (2 * radius + 1) + entry
    if part < 2:
        if (part == 0) | (radius > 0):
            tl.store(table, tl.sum(acc, 0))
    else:
        tl.store(table + tl.arange(0, BLOCK), acc, mask=low + tl.arange(0, BLOCK) < radius)
