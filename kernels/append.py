"""What writes into the pages: new keys and values, and copies of whole pages."""

from __future__ import annotations

import triton
import triton.language as tl

from .division import sequence_of
from .pages import nearest, to_float8
from .rope import load_rotated


@triton.jit(do_not_specialize=["tokens", "batch_size", "halvings", "max_pages", "num_pages"])
def append_kernel(
    x, pages, table, positions, cu, rope, tokens, heads, batch_size, halvings, max_pages, num_pages,
    LARGEST: tl.constexpr, FLOAT8: tl.constexpr, SET_SCALES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS of (token, head). A token at position -1, past the table, or of no page of the pool is skipped.

    LARGEST: the largest number that quantised pages hold, 0 for others. FLOAT8: pages come as bytes.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    sequence = token
    if cu is not None:
        sequence = sequence_of(cu, token, batch_size, halvings)
    live = (token < tokens) & (sequence < batch_size)
    position = tl.load(positions + token, mask=live, other=-1)
    live &= (position >= 0) & (position < max_pages * PAGE_SIZE)
    at = table.data + sequence * table.row + (position // PAGE_SIZE).to(tl.int64) * table.column
    page = tl.load(at, mask=live, other=-1).to(tl.int64)
    live &= (page >= 0) & (page < num_pages)

    rows = (x.data + token * x.row + head * x.head)[:, None]
    new = load_rotated(rows, live, position, rope, DIM, COLUMNS, PAIRS, INTERLEAVED)
    slot = (position % PAGE_SIZE).to(tl.int64)
    if LARGEST != 0:
        new = new.to(tl.float32)
        if pages.scales is not None:
            to_scale = pages.scales + page * pages.scales_page + slot * pages.scales_slot + head * pages.scales_head
            if SET_SCALES:
                scale = tl.max(tl.abs(new), 1) / LARGEST
                tl.store(to_scale, scale, mask=live)
            else:
                scale = tl.load(to_scale, mask=live, other=1.0)
            new = tl.where(scale > 0, 1.0, 0.0)[:, None] * new / tl.where(scale > 0, scale, 1.0)[:, None]
            new = tl.minimum(tl.maximum(new, -LARGEST), LARGEST)
        new = to_float8(new) if FLOAT8 else nearest(new)
    column = tl.arange(0, COLUMNS)[None, :]
    to = pages.data + (page * pages.page + slot * pages.slot + head * pages.head)[:, None] + column
    tl.store(to, new.to(pages.data.dtype.element_ty), mask=live[:, None] & (column < DIM))


@triton.jit(do_not_specialize=["rows", "num_pages", "blocks"])
def copy_kernel(
    pages, src, dst, rows, heads, num_pages, blocks, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS of (slot, head) of one page; ids past the pool are skipped."""
    n, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    source, target = tl.load(src + n).to(tl.int64), tl.load(dst + n).to(tl.int64)
    inside = (source >= 0) & (source < num_pages) & (target >= 0) & (target < num_pages)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < tl.where(inside, rows, 0))[:, None] & (column < DIM)
    slot, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    at = pages.data + (slot * pages.slot + head * pages.head)[:, None] + column
    tl.store(at + target * pages.page, tl.load(at + source * pages.page, mask=mask), mask=mask)
