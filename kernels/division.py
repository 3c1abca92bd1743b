"""How a paged call is divided: into tiles of packed rows and a part of the keys that they see.

With a plan (csrc/common/plan.h), as the host did it once for all layers of a step. Else from lengths on the device: a sequence
has `blocks` blocks of rows, and each block `splits` parts of keys, numbers that follow from shapes alone, so that a CUDA graph
holds for any lengths. What a block sees is cut evenly, into fewer parts where it is short; parts of fixed length counted from
key 0 (FIXED) make a row's bits independent of its batch and of the chunk it came in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .span import Blocks, Sequence, clamp, extent

LEAST_SPLIT = tl.constexpr(256)  # keys: below it, a merge costs more than it gains


class Batch(NamedTuple):
    """int32 tensors on the device; cu_q None: one query a sequence."""

    seqlens_k: Any  # (batch,)
    cu_q: Any  # (batch + 1,)
    prefix: Any  # (batch,)


class Tile(NamedTuple):
    """A row of a plan, of use where 0 <= n < its tiles; rows are packed rows."""

    sequence: Any
    row: Any
    row_end: Any
    key: Any
    key_end: Any
    slot: Any  # of its first row's partial result; -1: results are final
    shared: Any  # rows of several sequences, all of which see all of its keys


class Merge(NamedTuple):
    """Part t of row r: at slot shared_slot + t * shared_stride + r - row, and further on at own_slot + t * (row_end - row) + r - row."""

    row: Any
    row_end: Any
    shared_slot: Any
    shared_count: Any
    shared_stride: Any
    own_slot: Any
    own_count: Any


class Parts(NamedTuple):
    """Keys [origin + t * size, end) of a block of rows, part by part; `count` of them, one at least."""

    origin: Any
    size: Any
    count: Any
    end: Any


@triton.jit
def paged_sequence(batch, b, rows_q, max_q, longest, left, right, TOP_LEFT: tl.constexpr):
    """Sequence b; its keys are counted from 0."""
    row_q, len_q = b, 1
    if batch.cu_q is not None:
        row_q, len_q = extent(batch.cu_q, None, None, b, rows_q, max_q)
    len_k = clamp(tl.load(batch.seqlens_k + b), 0, longest)
    prefix = 0
    if batch.prefix is not None:
        prefix = clamp(tl.load(batch.prefix + b), 0, len_k)
    offset = 0
    if not TOP_LEFT:
        offset = len_k - len_q
    return Sequence(row_q, len_q, 0, len_k, prefix, offset, left, right)


@triton.jit
def tile_of(plan, n, batch_size, rows_q, capacity):
    """Contents are not trusted: nothing outside of the caller's tensors and the workspace."""
    at = plan + (1 + n) * 8
    row = clamp(tl.load(at + 1), 0, rows_q)
    row_end = clamp(tl.load(at + 2), row, rows_q)
    key = tl.maximum(tl.load(at + 3), 0)
    slot = tl.minimum(tl.load(at + 5), capacity - (row_end - row))
    return Tile(
        clamp(tl.load(at), 0, batch_size - 1), row, row_end, key, tl.maximum(tl.load(at + 4), key), slot,
        tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def merge_of(plan, n, rows_q):
    at = plan + (1 + tl.load(plan) + n) * 8
    row = clamp(tl.load(at), 0, rows_q)
    return Merge(
        row, clamp(tl.load(at + 1), row, rows_q), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6),
    )  # fmt: skip


@triton.jit
def sequence_of(cu, token, batch_size, halvings):
    """As many sequences as end at or before each token, found by halving."""
    low, high = tl.zeros_like(token), tl.zeros_like(token) + batch_size
    for _ in range(halvings):
        middle = (low + high) // 2
        ended = (middle < batch_size) & (tl.load(cu + 1 + middle, mask=middle < batch_size, other=0) <= token)
        low, high = tl.where(ended, middle + 1, low), tl.where(ended, high, middle)
    return low


@triton.jit
def parts_of(s, i0, i1, splits, BLOCK: tl.constexpr, FIXED: tl.constexpr):
    """Of what rows [i0, i1) may see, a gap between prefix and window included."""
    end = clamp(tl.maximum(i1 + s.offset + s.right, s.prefix), 0, s.len_k)
    begin = tl.where(s.prefix > 0, 0, clamp(i0 + s.offset - s.left, 0, end))
    if FIXED:
        origin, size = begin // FIXED * FIXED, FIXED
    else:
        origin = begin
        size = tl.maximum(tl.cdiv(tl.cdiv(end - begin, splits), BLOCK) * BLOCK, LEAST_SPLIT)
    return Parts(origin, size, tl.maximum(tl.cdiv(end - origin, size), 1), end)


@triton.jit
def section(s, first, end):
    """The sequence as keys [first, end) of it see it, counted from `first`."""
    length = tl.maximum(tl.minimum(end, s.len_k) - first, 0)
    prefix = clamp(s.prefix - first, 0, length)
    return Sequence(s.row_q, s.len_q, 0, length, prefix, s.offset - first, s.left, s.right)


@triton.jit
def in_order(blocks):
    """The same blocks one after another, each as an edge: what an edge computes does not depend on the rows beside it."""
    return Blocks(0, blocks.first + blocks.gap, blocks.outer, blocks.outer_end, blocks.outer_end, blocks.outer_end)
