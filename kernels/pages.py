"""Keys and values as they lie in the pages of a cache: where token j of a sequence is, and what the numbers there are worth."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .span import clamp

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")  # the interpreter has no assembly


class Pages(NamedTuple):
    """(page, slot, head, dim) of keys or values, and the scales of quantised ones; strides in elements, 0 where broadcast."""

    data: Any
    page: int
    slot: int
    head: int
    scales: Any
    scales_page: int
    scales_slot: int
    scales_head: int


class Table(NamedTuple):
    """int32 (batch, max_pages): which page holds keys page_size * n and on of a sequence."""

    data: Any
    row: int
    column: int


@triton.jit
def places(table, b, j, live, num_pages, PAGE_SIZE: tl.constexpr):
    """Page and slot of keys j of sequence b, those that live. Contents are not trusted: no page past the pool."""
    pointers = table.data + tl.cast(b, tl.int64) * table.row + tl.cast(j // PAGE_SIZE, tl.int64) * table.column
    return clamp(tl.load(pointers, mask=live, other=0), 0, num_pages - 1), j % PAGE_SIZE


@triton.jit
def offset_of(page, slot, page_stride, slot_stride):
    """Widened before any product: a pool may have more than 2^31 elements."""
    return page.to(tl.int64) * page_stride + slot.to(tl.int64) * slot_stride


@triton.jit
def load_stored(
    pages, head, page, slot, live, COLUMNS: tl.constexpr, DIM: tl.constexpr, ALL_LIVE: tl.constexpr, FLOAT8: tl.constexpr,
    NUMBERS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """(rows, COLUMNS) of type NUMBERS, not yet scaled; dead rows and columns from DIM on are 0 whatever memory holds there.

    AHEAD: the card converts in front of shared memory.
    FLOAT8: "native" where the card converts float8_e4m3fn, "bits" where pages come as bytes, "" for other pages.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    rows = offset_of(page, slot, pages.page, pages.slot)
    pointers = pages.data + tl.cast(head, tl.int64) * pages.head + rows[:, None] + column
    if ALL_LIVE and DIM == COLUMNS:
        x = tl.load(pointers)
    elif ALL_LIVE:
        x = tl.load(pointers, mask=column < DIM, other=0.0)
    elif DIM == COLUMNS:
        x = tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=live[:, None] & (column < DIM), other=0.0)
    if FLOAT8 == "bits":
        return float8(x).to(NUMBERS)
    elif FLOAT8 == "native" and AHEAD and COMPILED and NUMBERS == tl.float16:  # noqa: SIM300
        return settled(x.to(NUMBERS))
    elif FLOAT8 == "native" or x.dtype == NUMBERS:
        return x.to(NUMBERS)
    else:  # int8; the interpreter takes whole numbers for the bits of a bfloat16
        return x.to(tl.float32).to(NUMBERS)


@triton.jit
def settled(x):
    """x as it is, 16 bits a number. An instruction that is said to have effects keeps the compiler from widening bytes behind shared
    memory, whence it would fetch them one by one."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def load_scales(pages, head, page, slot, live, ALL_LIVE: tl.constexpr):
    """(rows,) float32."""
    pointers = pages.scales + tl.cast(head, tl.int64) * pages.scales_head
    pointers += offset_of(page, slot, pages.scales_page, pages.scales_slot)
    if ALL_LIVE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=live, other=0.0)


@triton.jit
def float8(x):
    """float32 of float8_e4m3fn bytes: as the bits of a float16, whose exponent is one bit longer, they are 2^-8 of their worth."""
    bits = x.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float16, bitcast=True).to(tl.float32) * 256)


@triton.jit
def to_float8(x):
    """The byte of float8_e4m3fn nearest to a float32 of at most 448, ties to even; NaN stays NaN. Integer arithmetic, for any card."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20  # three bits of mantissa
    normal -= (127 - 7) << 3
    small = nearest(tl.abs(x) * 512).to(tl.int32)  # below 2^-6 numbers lie 2^-9 apart
    number = tl.where(tl.abs(x) < 0.015625, small, normal)
    number = tl.where(x != x, 0x7F, number)
    return (number | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def nearest(x):
    """The whole number nearest to x, ties to even, for magnitudes up to 2^22."""
    return (x + 12582912.0) - 12582912.0
