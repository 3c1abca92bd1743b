"""Rotary position embedding on the way in (Su et al., "RoFormer", 2021)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .span import clamp


class Rope(NamedTuple):
    """cos and sin, float32 (positions, pairs) contiguous: they turn the first 2 * pairs dimensions."""

    cos: Any
    sin: Any
    positions: int


@triton.jit
def load_rotated(
    pointers,
    live,
    position,
    rope,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """(rows, COLUMNS) from `pointers` (rows, 1), whose last dimension is contiguous, turned by each row's position; dead rows are 0.

    PAIRS: 0 for no turning. The result has the type of what was loaded, as if it had been turned before.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    mask = live[:, None] & (column < DIM)
    x = tl.load(pointers + column, mask=mask, other=0.0)
    if PAIRS == 0:
        return x
    else:
        if INTERLEAVED:
            partner, pair, first = column ^ 1, column // 2, column % 2 == 0
        else:
            first = column < PAIRS
            partner, pair = tl.where(first, column + PAIRS, column - PAIRS), tl.where(first, column, column - PAIRS)
        turned = mask & (column < 2 * PAIRS)
        other = tl.load(pointers + partner, mask=turned, other=0.0).to(tl.float32)
        at = clamp(position, 0, rope.positions - 1).to(tl.int64)[:, None] * PAIRS + pair
        cos = tl.load(rope.cos + at, mask=turned, other=1.0)
        sin = tl.load(rope.sin + at, mask=turned, other=0.0)
        return (x.to(tl.float32) * cos + tl.where(first, -other, other) * sin).to(x.dtype)
