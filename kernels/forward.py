"""Forward: one program a block of query rows and a head, over the blocks of keys it sees, with an online softmax.

(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.)

Keys are never split over programs, and their blocks are counted from each sequence's key 0: what else is in the batch
changes no bit of a sequence (batch_invariant holds as it is).

BEHIND: values are multiplied one block behind, after the scores of the next. On Hopper that product runs under the softmax then, for
which it is otherwise too late: the compiler waits for whatever runs wherever scores are wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .outside import clear, clear_row, share
from .philox import kept
from .schedule import SIZES, job
from .span import bias_origin, count, key_blocks, pick, sequence
from .tile import LN2, dot, load, load_block, logits, softmax_step, store, store_row


@triton.jit
def as_bits(x):
    """Numbers that the next turn multiplies. As numbers the compiler would have them in shared memory, and wait for their product."""
    return x.to(tl.int16 if x.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)


@triton.jit
def weighted(
    weights, v, descriptor, batch, head, row, live, acc, decay, EDGE: tl.constexpr, FILLED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """acc * decay + weights @ values, these from `row` on."""
    tile = load_block(v, descriptor, batch, head, row, live, EDGE, FILLED, ROWS, COLUMNS, DIM)
    return dot(weights, tile, acc * decay[:, None])


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, k_descriptor, v_descriptor, out, lse, sink,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, heads, group, section, blocks,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BEHIND: tl.constexpr,
):  # fmt: skip
    batch_head, block = job(batch_size * heads, section, blocks, LAST_FIRST=True)
    b, h = batch_head // heads, batch_head % heads
    kv_head = h // group
    s = sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT)
    if lengths.cu_q is not None or lengths.len_q is not None:
        begin, end, step, hole, length = share(
            lengths.cu_q, s.row_q, s.len_q, b, block, batch_size, blocks, rows_q, BLOCK_M
        )
        for r in range(begin, end, step):
            clear(out, b, h, r, end, hole, length, BLOCK_M, BLOCK_DV, HEAD_DIM_V)
            clear_row(lse, b, h, r, end, hole, length, -float("inf"), BLOCK_M)
    i0 = block * BLOCK_M
    if i0 >= s.len_q:
        return
    live = s.len_q - i0
    origin = bias_origin(lengths, s)
    FILLED: tl.constexpr = lengths.cu_k is None and lengths.len_k is None
    UNIT: tl.constexpr = LN2 if PLAIN else 1.0  # of `largest` and of sums in the exponent

    tile_q = load(q, b, h, s.row_q + i0, live, BLOCK_M, BLOCK_D, HEAD_DIM, ALL_LIVE=False)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sink is not None:  # a key with this score and no value
        extra = tl.load(sink + h) * (1 / UNIT)
        largest = tl.full([BLOCK_M], 0.0, tl.float32) + extra
        total += tl.where(extra == -float("inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    NUMBER: tl.constexpr = v.data.dtype.element_ty
    if BEHIND:  # of the block before, and at first of none
        behind = as_bits(tl.zeros([BLOCK_M, BLOCK_N], NUMBER))
        decay = tl.full([BLOCK_M], 1.0, tl.float32)
        row_v, live_v = rows_k, 0

    plan = key_blocks(s, i0, tl.minimum(i0 + BLOCK_M, s.len_q), BLOCK_N)
    for EDGE in tl.static_range(2):
        for t in tl.range(0, count(plan, EDGE)):
            j0 = pick(plan, t, EDGE) * BLOCK_N
            row_k, live_k = s.row_k + j0, s.len_k - j0
            tile_k = load_block(k, k_descriptor, b, kv_head, row_k, live_k, EDGE, FILLED, BLOCK_N, BLOCK_D, HEAD_DIM)
            products = dot(tile_q, tl.trans(tile_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if BEHIND:
                acc = weighted(
                    behind.to(NUMBER, bitcast=True), v, v_descriptor, b, kv_head, row_v, live_v, acc, decay,
                    True, FILLED or not EDGE, BLOCK_N, BLOCK_DV, HEAD_DIM_V,
                )  # fmt: skip
            x, _ = logits(products, terms, s, b, h, i0, j0, origin, PLAIN, EDGE, KEYS_DOWN=False)
            p, largest, total, decay = softmax_step(x, largest, total, terms, PLAIN, EDGE or not PLAIN)
            if dropout is not None:
                p = tl.where(kept(dropout, b, h, i0, j0, BLOCK_M, BLOCK_N), p, 0.0)
            if BEHIND:
                behind, row_v, live_v = as_bits(p.to(NUMBER)), row_k, live_k
            else:
                acc = weighted(
                    p.to(NUMBER), v, v_descriptor, b, kv_head, row_k, live_k, acc, decay,
                    EDGE, FILLED, BLOCK_N, BLOCK_DV, HEAD_DIM_V,
                )  # fmt: skip
    if BEHIND:
        acc = weighted(
            behind.to(NUMBER, bitcast=True), v, v_descriptor, b, kv_head, row_v, live_v, acc, decay,
            True, FILLED, BLOCK_N, BLOCK_DV, HEAD_DIM_V,
        )  # fmt: skip

    seen = total != 0
    total = tl.where(seen, total, 1.0)
    weight = 1.0 / total
    if dropout is not None:
        weight *= dropout.keep_scale
    store(out, b, h, s.row_q + i0, live, acc * weight[:, None], BLOCK_M, BLOCK_DV, HEAD_DIM_V)
    natural = largest * UNIT + tl.log2(total) * LN2
    store_row(lse, b, h, s.row_q + i0, live, tl.where(seen, natural, -float("inf")), BLOCK_M)
