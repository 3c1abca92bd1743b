"""The gradients of row_distance_bias and col_distance_bias: dS of each query, or each key, by its clamped distances.

A program owns a block of rows of the gradient and walks past all that they met. Of a row, each entry but the outermost two is of
one score alone, so those are stored as they come; the outermost are sums, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .schedule import SIZES
from .score_gradient import score_gradient
from .span import sees_any, sequence


@triton.jit(do_not_specialize=[*SIZES, "radius"])
def drow_bias_kernel(
    q, k, v, dout, lse, delta, dbias, radius, blocks,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, heads, group,
    OF_KEYS: tl.constexpr, TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias (B, Hq, S, 2 * radius + 1) has `blocks` blocks of queries, or OF_KEYS of keys, and is 0 where nothing is seen."""
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % heads
    b = program // (blocks * heads)
    s = sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT)

    OWN: tl.constexpr = BLOCK_N if OF_KEYS else BLOCK_M
    MET: tl.constexpr = BLOCK_M if OF_KEYS else BLOCK_N
    own0 = block * OWN
    live, met = s.len_q, s.len_k
    if OF_KEYS:
        live, met = s.len_k, s.len_q
    row = own0 + tl.arange(0, OWN)
    at = dbias.data + b.to(tl.int64) * dbias.batch + h.to(tl.int64) * dbias.head + row.to(tl.int64) * dbias.row
    nearest = tl.zeros([OWN], tl.float32)
    furthest = tl.zeros([OWN], tl.float32)
    for met0 in range(0, tl.where(own0 < live, met, 0), MET):
        i0, j0 = own0, met0
        if OF_KEYS:
            i0, j0 = met0, own0
        if sees_any(s, i0, i0 + BLOCK_M, j0, j0 + BLOCK_N):
            ds = score_gradient(
                q, k, v, dout, lse, delta, lengths, terms, dropout, s, b, h, group, i0, j0,
                PLAIN, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            i, j = i0 + tl.arange(0, BLOCK_M)[:, None], j0 + tl.arange(0, BLOCK_N)[None, :]
            distance = j - (i + s.offset)
            below, above = distance <= -radius, (distance >= radius) & (distance > -radius)
            nearest += tl.sum(tl.where(below, ds, 0.0), 0 if OF_KEYS else 1)
            furthest += tl.sum(tl.where(above, ds, 0.0), 0 if OF_KEYS else 1)
            rows = at[None, :] if OF_KEYS else at[:, None]
            between = (i < s.len_q) & (j < s.len_k) & (distance > -radius) & (distance < radius)
            tl.store(rows + (distance + radius), ds.to(dbias.data.dtype.element_ty), mask=between)

    if radius == 0:
        nearest += furthest
    tl.store(at, nearest.to(dbias.data.dtype.element_ty), mask=row < live)
    tl.store(at + 2 * radius, furthest.to(dbias.data.dtype.element_ty), mask=row < tl.where(radius > 0, live, 0))
