"""What every kernel does with one tile of queries and keys: load it, multiply it, make scores of the products.

A tile has queries down and keys across, or with KEYS_DOWN the reverse: i and j are tensors that broadcast.

Probabilities are powers of 2. Where a score is nothing but scale * <q, k> (PLAIN), scale * log2(e) is one factor in the exponent and
reference values, to be subtracted there, are in units of log2; else scores and reference values are natural, and a score may be as low
as finite numbers go.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .span import visible

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The interpreter multiplies the bits of bfloat16, so it is given float32.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, c):
    """a @ b + c in float32; float32 operands keep all their bits (no TF32)."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def start(view, batch, head, row):
    """The first element of a row. Widened before any product: a tensor may have more than 2^31 elements."""
    return (
        view.data
        + tl.cast(batch, tl.int64) * view.batch
        + tl.cast(row, tl.int64) * view.row
        + tl.cast(head, tl.int64) * view.head
    )


@triton.jit
def offsets(view, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None].to(tl.int64) * view.row + tl.arange(0, COLUMNS)[None, :] * view.dim


@triton.jit
def load(
    view, batch, head, row, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, ALL_LIVE: tl.constexpr
):
    """(ROWS, COLUMNS) from `row` on; rows from `live` on and columns from DIM on are 0 whatever memory holds there."""
    pointers = start(view, batch, head, row) + offsets(view, ROWS, COLUMNS)
    if ALL_LIVE and DIM == COLUMNS:
        return tl.load(pointers)
    elif ALL_LIVE:
        return tl.load(pointers, mask=tl.arange(0, COLUMNS)[None, :] < DIM, other=0.0)
    elif DIM == COLUMNS:
        return tl.load(pointers, mask=tl.arange(0, ROWS)[:, None] < live, other=0.0)
    else:
        mask = (tl.arange(0, ROWS)[:, None] < live) & (tl.arange(0, COLUMNS)[None, :] < DIM)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_between(view, batch, head, row, first, live, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    """The same for a tile that may begin before its sequence: rows before `first` are 0 too."""
    r = tl.arange(0, ROWS)[:, None]
    mask = (r >= first) & (r < live) & (tl.arange(0, COLUMNS)[None, :] < DIM)
    return tl.load(start(view, batch, head, row) + offsets(view, ROWS, COLUMNS), mask=mask, other=0.0)


@triton.jit
def load_block(
    view, descriptor, batch, head, row, live, EDGE: tl.constexpr, FILLED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The same by bulk tensor copy, where there is a descriptor and no stranger's row can come along.

    FILLED: sequences fill their padded rows, and past those a descriptor reads 0. Elsewhere only inside blocks are safe.
    """
    if descriptor is not None and (FILLED or not EDGE):
        if len(descriptor.block_shape) == 3:  # packed
            return descriptor.load([head, row, 0]).reshape(ROWS, COLUMNS)
        else:
            return descriptor.load([batch, head, row, 0]).reshape(ROWS, COLUMNS)
    else:
        return load(view, batch, head, row, live, ROWS, COLUMNS, DIM, ALL_LIVE=not EDGE)


@triton.jit
def store(view, batch, head, row, live, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr):
    mask = (tl.arange(0, ROWS)[:, None] < live) & (tl.arange(0, COLUMNS)[None, :] < DIM)
    tl.store(start(view, batch, head, row) + offsets(view, ROWS, COLUMNS), x.to(view.data.dtype.element_ty), mask=mask)


@triton.jit
def load_row(view, batch, head, row, live, missing, ROWS: tl.constexpr):
    """(ROWS,) of a tensor with one number a row."""
    r = tl.arange(0, ROWS)
    return tl.load(start(view, batch, head, row) + r.to(tl.int64) * view.row, mask=r < live, other=missing)


@triton.jit
def store_row(view, batch, head, row, live, x, ROWS: tl.constexpr):
    r = tl.arange(0, ROWS)
    tl.store(start(view, batch, head, row) + r.to(tl.int64) * view.row, x, mask=r < live)


@triton.jit
def probabilities(x, reference, terms, PLAIN: tl.constexpr):
    """exp(score - reference). Differences come before anything is rounded, so large scores lose nothing."""
    if not PLAIN:
        return tl.exp2((x - reference) * LOG2E)
    elif INTERPRET:  # which rounds the product in a fused multiply-add
        return tl.exp2((x.to(tl.float64) * terms.log2_scale - reference).to(tl.float32))
    else:
        return tl.exp2(tl.fma(x, terms.log2_scale, -reference))


@triton.jit
def softmax_step(x, largest, total, terms, PLAIN: tl.constexpr, MAYBE_EMPTY: tl.constexpr):
    """Probabilities of a tile's scores against the running maximum, that maximum, the running sum, and what older sums shrink by.

    MAYBE_EMPTY: a row may have seen nothing yet, as in any block if a term of its scores may be -inf.
    """
    unit: tl.constexpr = LN2 if PLAIN else 1.0
    highest = tl.max(x, 1) * terms.log2_scale if PLAIN else tl.max(x, 1)
    new_largest = tl.maximum(largest, highest)
    reference = new_largest
    if MAYBE_EMPTY:
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    p = probabilities(x, reference[:, None], terms, PLAIN)
    decay = tl.exp2((largest - reference) * (unit * LOG2E))
    return p, new_largest, total * decay + tl.sum(p, 1), decay


@triton.jit
def reference_of(lse, PLAIN: tl.constexpr):
    """Of rows as stored; a row that sees nothing gets no probability at all."""
    unit: tl.constexpr = LOG2E if PLAIN else 1.0
    return tl.where(lse == -float("inf"), float("inf"), lse * unit)


@triton.jit
def tanh(x):
    """To about 1 ulp, small arguments too: the polynomial is that of Cephes' tanhf."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (p * z - 3.33332819422e-1) * z * x + x
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def bias_at(terms, s, batch, head, i, j, origin):
    """The bias for rows i and keys j, 0 outside the sequence, where it is never read; origin as in `bias_origin`."""
    pointers = terms.bias + tl.cast(batch, tl.int64) * terms.bias_batch + tl.cast(head, tl.int64) * terms.bias_head
    pointers += tl.cast(origin[0] + i, tl.int64) * terms.bias_row + tl.cast(origin[1] + j, tl.int64) * terms.bias_column
    return tl.load(pointers, mask=in_sequence(s, i, j), other=0)


@triton.jit
def in_sequence(s, i, j):
    return (i >= 0) & (i < s.len_q) & (j >= 0) & (j < s.len_k)


@triton.jit
def in_row_table(table, batch_stride, head_stride, row_stride, entry, radius, batch, head, row, distance, mask):
    """What a table (batch, head, row, 2 * radius + 1) has for rows and clamped distances."""
    pointers = table + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
    pointers += tl.cast(row, tl.int64) * row_stride
    pointers = pointers + tl.cast(tl.minimum(tl.maximum(distance, -radius), radius) + radius, tl.int64) * entry
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def logits(
    products, terms, s, batch, head, i0, j0, origin, PLAIN: tl.constexpr, EDGE: tl.constexpr, KEYS_DOWN: tl.constexpr
):
    """The terms of docs/semantics.md for the tile of rows i0.. and keys j0..: scores (PLAIN: products still), and the soft cap's slope on the way back."""
    M: tl.constexpr = products.shape[1 if KEYS_DOWN else 0]
    N: tl.constexpr = products.shape[0 if KEYS_DOWN else 1]
    i, j = i0 + tl.arange(0, M), j0 + tl.arange(0, N)
    if KEYS_DOWN:
        i, j = i[None, :], j[:, None]
    else:
        i, j = i[:, None], j[None, :]
    nearest, furthest = j0 - (i0 + M - 1 + s.offset), j0 + N - 1 - (i0 + s.offset)
    return scores(products, terms, s, batch, head, i, j, nearest, furthest, origin, PLAIN, EDGE)


@triton.jit
def scores(products, terms, s, batch, head, i, j, nearest, furthest, origin, PLAIN: tl.constexpr, EDGE: tl.constexpr):
    """The same for any rows i and keys j, whose distances lie between `nearest` and `furthest`; a row may have a head of its own."""
    x, slope = products, 1.0
    if not PLAIN:
        x = products * terms.scale
    if terms.softcap is not None:
        t = tanh(x / terms.softcap)
        x = t * terms.softcap
        slope = 1 - t * t
    if terms.distance_bias is not None:
        middle = terms.distance_bias + tl.cast(head, tl.int64) * (2 * terms.radius + 1) + terms.radius
        if (nearest < terms.radius) & (furthest > -terms.radius):
            x += tl.load(middle + tl.minimum(tl.maximum(j - (i + s.offset), -terms.radius), terms.radius))
        else:  # beyond the table's reach all have one bias
            x += tl.load(middle + tl.where(nearest < terms.radius, -terms.radius, terms.radius))
    if terms.row_distance_bias is not None:
        x += in_row_table(
            terms.row_distance_bias, terms.row_batch, terms.row_head, terms.row_row, terms.row_entry, terms.row_radius,
            batch, head, i, j - (i + s.offset), in_sequence(s, i, j),
        )  # fmt: skip
    if terms.col_distance_bias is not None:
        x += in_row_table(
            terms.col_distance_bias, terms.col_batch, terms.col_head, terms.col_row, terms.col_entry, terms.col_radius,
            batch, head, origin[2] + j, j - (i + s.offset), in_sequence(s, i, j),
        )  # fmt: skip
    if terms.alibi_slopes is not None:
        x -= tl.load(terms.alibi_slopes + head) * tl.abs(j - (i + s.offset)).to(tl.float32)
    if terms.bias is not None:
        bias = bias_at(terms, s, batch, head, i, j, origin)
        if bias.dtype == tl.uint8:  # a boolean one
            x = tl.where(bias != 0, x, -float("inf"))
        else:
            x += bias.to(tl.float32)
    if EDGE:
        x = tl.where(visible(s, i, j), x, -float("inf"))
    return x, slope
