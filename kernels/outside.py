"""Rows that belong to no sequence: padding in a dense call, what follows the last sequence in a packed one. They are written too."""

from __future__ import annotations

import triton
import triton.language as tl

from .span import clamp


@triton.jit
def share(cu, first, length, b, block, batch_size, blocks, rows, ROWS: tl.constexpr):
    """Of all outside rows, numbered without the hole that the sequences make, those that this program clears.

    Returns begin, end and step of its blocks, and where the hole begins and how long it is.
    """
    begin, step = block.to(tl.int64) * ROWS, blocks.to(tl.int64) * ROWS
    if cu is not None:
        hole = clamp(tl.load(cu + batch_size), 0, rows)
        return begin + b * step, rows - hole, batch_size * step, 0, hole
    else:
        return begin, rows - length, step, first, length


@triton.jit
def clear(view, b, h, r, live, hole, hole_length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """Zeroes outside rows r .. r + ROWS."""
    u = r + tl.arange(0, ROWS)
    row = (u + tl.where(u >= hole, hole_length, 0)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    pointers = view.data + tl.cast(b, tl.int64) * view.batch + tl.cast(h, tl.int64) * view.head
    pointers = pointers + row[:, None] * view.row + column[None, :] * view.dim
    zero = tl.zeros([ROWS, COLUMNS], view.data.dtype.element_ty)
    tl.store(pointers, zero, mask=(u[:, None] < live) & (column[None, :] < DIM))


@triton.jit
def clear_row(view, b, h, r, live, hole, hole_length, value, ROWS: tl.constexpr):
    u = r + tl.arange(0, ROWS)
    row = (u + tl.where(u >= hole, hole_length, 0)).to(tl.int64)
    pointers = view.data + tl.cast(b, tl.int64) * view.batch + tl.cast(h, tl.int64) * view.head + row * view.row
    tl.store(pointers, tl.zeros([ROWS], tl.float32) + value, mask=u < live)
