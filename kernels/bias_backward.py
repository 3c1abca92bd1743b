"""The gradient of a dense bias: dS summed over every dimension in which the bias is broadcast.

A program owns one tile of the gradient and forms again every dS that belongs to it, in a fixed order: no tensor of
Sq x Sk but the gradient itself, and no sum that depends on who comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .schedule import SIZES
from .score_gradient import score_gradient
from .span import bias_origin, sees_any, sequence


@triton.jit(
    do_not_specialize=[
        *SIZES,
        "sum_batch",
        "sum_heads",
        "sum_rows",
        "sum_columns",
        "own_heads",
        "own_rows",
        "own_columns",
    ]
)
def dbias_kernel(
    q, k, v, dout, lse, delta, dbias, sum_batch, sum_heads, sum_rows, sum_columns, own_heads, own_rows, own_columns,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, group,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr, TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """own_*: how many heads and blocks of rows and columns dbias has; sum_*: how many of each, and sequences, go into one tile of it."""
    program = tl.program_id(0)
    own_column = program % own_columns
    own_row = program // own_columns % own_rows
    own_head = program // (own_columns * own_rows) % own_heads
    own_batch = program // (own_columns * own_rows * own_heads)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(own_batch, own_batch + sum_batch):
        s = sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT)
        origin = bias_origin(lengths, s)
        for t in range(0, sum_heads * sum_rows * sum_columns):
            h = own_head + t // (sum_rows * sum_columns)
            i0 = (own_row + t // sum_columns % sum_rows) * BLOCK_M - origin[0]
            j0 = (own_column + t % sum_columns) * BLOCK_N - origin[1]
            if sees_any(s, i0, i0 + BLOCK_M, j0, j0 + BLOCK_N):
                acc += score_gradient(
                    q, k, v, dout, lse, delta, lengths, terms, dropout, s, b, h, group, i0, j0,
                    PLAIN, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                )  # fmt: skip

    row, column = (
        own_row * BLOCK_M + tl.arange(0, BLOCK_M)[:, None],
        own_column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :],
    )
    live_rows, live_columns = max_q, max_k
    if ONE_ROW:
        acc = tl.sum(acc, 0, keep_dims=True)
        row, live_rows = tl.zeros([1, 1], tl.int32), 1
    if ONE_COLUMN:
        acc = tl.sum(acc, 1, keep_dims=True)
        column, live_columns = tl.zeros([1, 1], tl.int32), 1
    pointers = dbias.data + own_batch.to(tl.int64) * dbias.batch + own_head.to(tl.int64) * dbias.head
    pointers = pointers + row.to(tl.int64) * dbias.row + column.to(tl.int64) * dbias.column
    tl.store(pointers, acc.to(dbias.data.dtype.element_ty), mask=(row < live_rows) & (column < live_columns))
