"""The dropout mask (docs/semantics.md): nothing is stored, forward and backward and every backend draw the same.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = seed and counter
(j // 4, i, head, batch); probability (i, j) is kept when word j % 4 is at least floor(p * 2^32).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(seed, j4, i, head, batch):
    zero = j4 * 0 + i * 0
    return tl.philox(tl.load(seed), j4 + zero, i + zero, head + zero, batch + zero)


@triton.jit
def kept(dropout, batch, head, i0, j0, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of rows from i0 and keys from j0, a multiple of 4: one draw gives four neighbours."""
    i = i0 + tl.arange(0, ROWS)
    j4 = j0 // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = words(dropout.seed, j4[None, :], i[:, None], head, batch)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLUMNS)
    return word >= dropout.drop_below.to(tl.uint32, bitcast=True)


@triton.jit
def kept_at(dropout, batch, head, i, j):
    """The same for any i and j that broadcast, at four times the price."""
    w0, w1, w2, w3 = words(dropout.seed, j // 4, i, head, batch)
    r = j % 4
    word = tl.where(r < 2, tl.where(r == 0, w0, w1), tl.where(r == 2, w2, w3))
    return word >= dropout.drop_below.to(tl.uint32, bitcast=True)
