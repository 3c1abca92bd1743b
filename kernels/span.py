"""Which keys a query sees (docs/semantics.md), and which blocks that makes: the one source for every mask.

All of it is 32-bit scalar arithmetic on a sequence's numbers. Blocks fall into three classes: outside (never visited), inside
(every row of the tile sees every key: no test), edge (each element is tested).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sequence(NamedTuple):
    """Sequence b. Query i, stored at row_q + i, has position i + offset and sees j < prefix or -left <= j - position <= right."""

    row_q: Any
    len_q: Any
    row_k: Any
    len_k: Any
    prefix: Any
    offset: Any
    left: Any
    right: Any


class Blocks(NamedTuple):
    """Block numbers to visit: inside [0, first) and [inner, inner_end), edge [first, first + gap), [outer, inner) and [inner_end, outer_end)."""

    first: Any
    gap: Any
    outer: Any
    inner: Any
    inner_end: Any
    outer_end: Any


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def extent(cu, lens, starts, b, rows, limit):
    """First row and length of sequence b among `rows` rows. Contents are not trusted: no read past the caller's tensors."""
    if cu is not None:
        row = clamp(tl.load(cu + b), 0, rows)
        length = clamp(tl.load(cu + b + 1) - row, 0, tl.minimum(limit, rows - row))
    else:
        row = 0
        if starts is not None:
            row = clamp(tl.load(starts + b), 0, rows)
        length = rows - row
        if lens is not None:
            length = clamp(tl.load(lens + b), 0, length)
    return row, length


@triton.jit
def sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT: tl.constexpr):
    row_q, len_q = extent(lengths.cu_q, lengths.len_q, lengths.start_q, b, rows_q, max_q)
    row_k, len_k = extent(lengths.cu_k, lengths.len_k, lengths.start_k, b, rows_k, max_k)
    prefix = 0
    if lengths.prefix is not None:
        prefix = clamp(tl.load(lengths.prefix + b), 0, len_k)
    offset = 0
    if not TOP_LEFT:
        offset = len_k - len_q
    return Sequence(row_q, len_q, row_k, len_k, prefix, offset, left, right)


@triton.jit
def bias_origin(lengths, s):
    """Where row 0 and key 0 of s are in a bias, as stored in dense calls, at the start in packed ones; and which key of the whole
    sequence key 0 is, which may be a part's first."""
    if lengths.cu_q is not None:
        return 0, 0, 0
    else:
        return s.row_q, s.row_k, 0


@triton.jit
def visible(s, i, j):
    """i and j broadcast against each other; a row past the sequence may be called visible, a key may not."""
    distance = j - (i + s.offset)
    return (j < s.len_k) & ((j < s.prefix) | ((distance >= -s.left) & (distance <= s.right)))


@triton.jit
def sees_any(s, i0, i1, j0, j1):
    """Whether rows [i0, i1) may see some of keys [j0, j1), ranges that may reach beyond the sequence."""
    i0, i1 = tl.maximum(i0, 0), tl.minimum(i1, s.len_q)
    j0, j1 = tl.maximum(j0, 0), tl.minimum(j1, s.len_k)
    window = (j1 - 1 >= i0 + s.offset - s.left) & (j0 <= i1 - 1 + s.offset + s.right)
    return (i0 < i1) & (j0 < j1) & ((j0 < s.prefix) | window)


@triton.jit
def key_blocks(s, i0, i1, BLOCK: tl.constexpr):
    """Blocks of keys for rows [i0, i1) of one sequence, i0 < i1."""
    first_all = clamp(i1 - 1 + s.offset - s.left, 0, s.len_k)  # keys [first_all, last_all) lie in every row's window
    last_all = clamp(i0 + s.offset + s.right + 1, 0, s.len_k)
    low = clamp(i0 + s.offset - s.left, s.prefix, s.len_k)  # keys [low, high) lie in some row's window, past the prefix
    high = clamp(i1 - 1 + s.offset + s.right + 1, low, s.len_k)

    first = s.prefix // BLOCK
    prefix_end = tl.cdiv(s.prefix, BLOCK)
    outer = tl.where(low < high, low // BLOCK, prefix_end)
    outer_end = tl.maximum(tl.where(low < high, tl.cdiv(high, BLOCK), prefix_end), prefix_end)
    apart = outer > prefix_end
    gap = tl.where(apart, prefix_end - first, 0)
    outer = tl.where(apart, outer, first)
    # A block that the prefix ends in is inside when the window of every row goes on from there.
    inner = clamp(tl.where(first_all <= s.prefix, first, tl.cdiv(first_all, BLOCK)), outer, outer_end)
    inner_end = clamp(last_all // BLOCK, inner, outer_end)
    return Blocks(first, gap, outer, inner, inner_end, outer_end)


@triton.jit
def query_blocks(s, j0, j1, BLOCK: tl.constexpr):
    """Blocks of query rows that see keys [j0, j1), j0 < j1 <= len_k; a block that crosses the last row is an edge."""
    must_start = tl.maximum(j0, s.prefix)  # what the prefix leaves to the window
    low = clamp(j0 - s.right - s.offset, 0, s.len_q)
    high = clamp(j1 - 1 + s.left - s.offset + 1, low, s.len_q)
    first_all = clamp(j1 - 1 - s.right - s.offset, 0, s.len_q)
    last_all = clamp(must_start + s.left - s.offset + 1, 0, s.len_q)
    low = tl.where(j0 < s.prefix, 0, low)
    high = tl.where(j0 < s.prefix, s.len_q, high)
    first_all = tl.where(j1 <= s.prefix, 0, first_all)
    last_all = tl.where(j1 <= s.prefix, s.len_q, last_all)

    outer = low // BLOCK
    outer_end = tl.where(low < high, tl.cdiv(high, BLOCK), outer)
    inner = clamp(tl.cdiv(first_all, BLOCK), outer, outer_end)
    inner_end = clamp(last_all // BLOCK, inner, outer_end)
    return Blocks(0, 0, outer, inner, inner_end, outer_end)


@triton.jit
def count(blocks, EDGE: tl.constexpr):
    if EDGE:
        n = blocks.gap + (blocks.inner - blocks.outer) + (blocks.outer_end - blocks.inner_end)
    else:
        n = blocks.first + (blocks.inner_end - blocks.inner)
    return n


@triton.jit
def pick(blocks, t, EDGE: tl.constexpr):
    """The t-th block of its class."""
    if EDGE:
        before_inner = blocks.gap + (blocks.inner - blocks.outer)
        n = tl.where(t < blocks.gap, blocks.first + t, blocks.outer + t - blocks.gap)
        n = tl.where(t < before_inner, n, blocks.inner_end + t - before_inner)
    else:
        n = tl.where(t < blocks.first, t, blocks.inner + t - blocks.first)
    return n
