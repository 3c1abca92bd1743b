"""One attention call as the kernels take it: plain named tuples of tensors and numbers, built once on the host.

A field that is None costs nothing: a kernel is compiled without the code that would read it. No field is a tuple itself: Triton 3.6
forgets the constants of an inner tuple where an early return parts a kernel (it keeps the outer one's type as it was at first).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call

UNBOUNDED = 2**30  # of a span; positions and distances add up in 32 bits
LOG2E = math.log2(math.e)


class View(NamedTuple):
    """(batch, row, head, dim) of a tensor, strides in elements; packed tensors have no batch and stride 0 for it."""

    data: Any
    batch: int
    row: int
    head: int
    dim: int


class Plane(NamedTuple):
    """A bias over (batch, head, row, column), stride 0 where it is broadcast."""

    data: Any
    batch: int
    head: int
    row: int
    column: int


class Lengths(NamedTuple):
    """Where each sequence lies: int32 tensors or None. Rows are counted in the padded row (dense) or in all (packed)."""

    cu_q: Any
    cu_k: Any
    len_q: Any
    len_k: Any
    start_q: Any
    start_k: Any
    prefix: Any


class Terms(NamedTuple):
    """What makes a score out of <q, k>."""

    scale: float
    log2_scale: float  # scale * log2(e)
    softcap: float | None
    distance_bias: Any  # (heads_q, 2 * radius + 1)
    radius: int | None
    alibi_slopes: Any  # (heads_q,)
    bias: Any  # and its strides, as in Plane; a boolean one as uint8
    bias_batch: int | None
    bias_head: int | None
    bias_row: int | None
    bias_column: int | None
    row_distance_bias: Any  # (batch, heads_q, rows, 2 * radius + 1), its strides and radius
    row_batch: int | None
    row_head: int | None
    row_row: int | None
    row_entry: int | None
    row_radius: int | None
    col_distance_bias: Any  # the same with a row for each key
    col_batch: int | None
    col_head: int | None
    col_row: int | None
    col_entry: int | None
    col_radius: int | None


class Dropout(NamedTuple):
    seed: Any  # int64 (1,)
    drop_below: int  # of a 32-bit word, as the signed integer with the same bits
    keep_scale: float


def view(x: Tensor) -> View:
    """x is (B, S, H, D) or (T, H, D)."""
    return View(x, x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2), x.stride(-1))


def row_view(x: Tensor) -> View:
    """One number a row, like lse: (B, H, S) or (H, T)."""
    return View(x, x.stride(0) if x.dim() == 3 else 0, x.stride(-1), x.stride(-2), 0)


def plane(x: Tensor) -> Plane:
    return Plane(x, *(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)))


def lengths(c: Call) -> Lengths:
    return Lengths(c.cu_seqlens_q, c.cu_seqlens_k, c.seqlens_q, c.seqlens_k, c.starts_q, c.starts_k, c.prefix)


def terms(c: Call) -> Terms:
    bias = c.bias.view(torch.uint8) if c.bias is not None and c.bias.dtype == torch.bool else c.bias
    scale = c.q.shape[-1] ** -0.5 if c.scale is None else c.scale
    return Terms(
        scale,
        scale * LOG2E,
        c.softcap if c.softcap > 0 else None,
        c.distance_bias,
        None if c.distance_bias is None else c.distance_bias.shape[-1] // 2,
        c.alibi_slopes,
        *([None] * 5 if bias is None else plane(bias)),
        *_row_table(c.row_distance_bias),
        *_row_table(c.col_distance_bias),
    )


def _row_table(x: Tensor | None) -> tuple:
    return (None,) * 6 if x is None else (x, *x.stride(), x.shape[-1] // 2)


def dropout(c: Call) -> Dropout | None:
    if c.dropout_p == 0:
        return None
    threshold = math.floor(c.dropout_p * 2**32)
    return Dropout(c.seed, threshold - 2**32 if threshold >= 2**31 else threshold, 1 / (1 - c.dropout_p))


def plain(t: Terms) -> bool:
    """A score is a positive multiple of <q, k>: the factor can be applied inside the exponent."""
    others = (t.softcap, t.distance_bias, t.alibi_slopes, t.bias, t.row_distance_bias, t.col_distance_bias)
    return t.scale > 0 and all(x is None for x in others)
