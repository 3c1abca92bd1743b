"""Backward of q, k and v: deterministic, nothing is added to memory that another program adds to.

dq has a program for each block of query rows, over the blocks of keys it sees; dk and dv have one for each block of keys and kv
head, over the blocks of query rows that see it, of every query head that shares it. Both form the scores again from q, k and lse
(Dao, "FlashAttention-2", 2023). With P the probabilities and D = dropout,

    dv = D(P)^T dout     dP = D(dout v^T)     dS = P * (dP - delta)     delta = rowsum(dout * out) - dlse
"""

from __future__ import annotations

import triton
import triton.language as tl

from .outside import clear, share
from .philox import kept
from .schedule import SIZES, job
from .span import bias_origin, count, key_blocks, pick, query_blocks, sequence
from .tile import LOG2E, dot, load, load_block, load_row, logits, probabilities, reference_of, store, store_row


@triton.jit(do_not_specialize=["rows", "blocks"])
def delta_kernel(
    dout, dlse, out, lse, delta, rows, heads, blocks,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta of every stored row; 0 where lse is -inf, whatever dout and dlse hold there."""
    program = tl.program_id(0)
    b, h, row = program // (heads * blocks), program // blocks % heads, program % blocks * BLOCK_M
    live = rows - row
    a = load(dout, b, h, row, live, BLOCK_M, BLOCK_DV, HEAD_DIM_V, ALL_LIVE=False).to(tl.float32)
    x = tl.sum(a * load(out, b, h, row, live, BLOCK_M, BLOCK_DV, HEAD_DIM_V, ALL_LIVE=False).to(tl.float32), 1)
    if dlse is not None:
        x -= load_row(dlse, b, h, row, live, 0.0, BLOCK_M)
    seen = load_row(lse, b, h, row, live, 0.0, BLOCK_M) > -float("inf")
    store_row(delta, b, h, row, live, tl.where(seen, x, 0.0), BLOCK_M)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, k_descriptor, v_descriptor, dout, lse, delta, dq,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, heads, group, section, blocks,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
            clear(dq, b, h, r, end, hole, length, BLOCK_M, BLOCK_D, HEAD_DIM)
    i0 = block * BLOCK_M
    if i0 >= s.len_q:
        return
    live = s.len_q - i0
    origin = bias_origin(lengths, s)

    tile_q = load(q, b, h, s.row_q + i0, live, BLOCK_M, BLOCK_D, HEAD_DIM, ALL_LIVE=False)
    tile_dout = load(dout, b, h, s.row_q + i0, live, BLOCK_M, BLOCK_DV, HEAD_DIM_V, ALL_LIVE=False)
    row_lse = reference_of(load_row(lse, b, h, s.row_q + i0, live, -float("inf"), BLOCK_M), PLAIN)[:, None]
    row_delta = load_row(delta, b, h, s.row_q + i0, live, 0.0, BLOCK_M)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    FILLED: tl.constexpr = lengths.cu_k is None and lengths.len_k is None
    plan = key_blocks(s, i0, tl.minimum(i0 + BLOCK_M, s.len_q), BLOCK_N)
    for EDGE in tl.static_range(2):
        for t in tl.range(0, count(plan, EDGE)):
            j0 = pick(plan, t, EDGE) * BLOCK_N
            row_k, live_k = s.row_k + j0, s.len_k - j0
            tile_k = load_block(k, k_descriptor, b, kv_head, row_k, live_k, EDGE, FILLED, BLOCK_N, BLOCK_D, HEAD_DIM)
            tile_v = load_block(v, v_descriptor, b, kv_head, row_k, live_k, EDGE, FILLED, BLOCK_N, BLOCK_DV, HEAD_DIM_V)
            products = dot(tile_q, tl.trans(tile_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            dp = dot(tile_dout, tl.trans(tile_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            x, slope = logits(products, terms, s, b, h, i0, j0, origin, PLAIN, EDGE, KEYS_DOWN=False)
            p = probabilities(x, row_lse, terms, PLAIN)
            if dropout is not None:
                dp = tl.where(kept(dropout, b, h, i0, j0, BLOCK_M, BLOCK_N), dp * dropout.keep_scale, 0.0)
            ds = p * (dp - row_delta) * slope
            acc = dot(ds.to(tile_k.dtype), tile_k, acc)
    store(dq, b, h, s.row_q + i0, live, acc * terms.scale, BLOCK_M, BLOCK_D, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q, k, v, q_descriptor, dout_descriptor, dout, lse, delta, dk, dv,
    lengths, terms, dropout, left, right, rows_q, rows_k, max_q, max_k, batch_size, heads_kv, group, section, blocks,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles lie with keys down and queries across: P^T and dS^T are then left operands, which stay in registers."""
    batch_head, block = job(batch_size * heads_kv, section, blocks, LAST_FIRST=False)
    b, kv_head = batch_head // heads_kv, batch_head % heads_kv
    s = sequence(lengths, b, rows_q, rows_k, max_q, max_k, left, right, TOP_LEFT)
    if lengths.cu_k is not None or lengths.len_k is not None:
        begin, end, step, hole, length = share(
            lengths.cu_k, s.row_k, s.len_k, b, block, batch_size, blocks, rows_k, BLOCK_N
        )
        for r in range(begin, end, step):
            clear(dk, b, kv_head, r, end, hole, length, BLOCK_N, BLOCK_D, HEAD_DIM)
            clear(dv, b, kv_head, r, end, hole, length, BLOCK_N, BLOCK_DV, HEAD_DIM_V)
    j0 = block * BLOCK_N
    if j0 >= s.len_k:
        return
    live = s.len_k - j0
    origin = bias_origin(lengths, s)

    tile_k = load(k, b, kv_head, s.row_k + j0, live, BLOCK_N, BLOCK_D, HEAD_DIM, ALL_LIVE=False)
    tile_v = load(v, b, kv_head, s.row_k + j0, live, BLOCK_N, BLOCK_DV, HEAD_DIM_V, ALL_LIVE=False)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    FILLED: tl.constexpr = lengths.cu_q is None and lengths.len_q is None
    plan = query_blocks(s, j0, tl.minimum(j0 + BLOCK_N, s.len_k), BLOCK_M)
    for EDGE in tl.static_range(2):
        each = count(plan, EDGE)
        for t in tl.range(0, group * each):
            h = kv_head * group + t // each
            i0 = pick(plan, t % each, EDGE) * BLOCK_M
            row, live_q = s.row_q + i0, s.len_q - i0
            tile_q = load_block(q, q_descriptor, b, h, row, live_q, EDGE, FILLED, BLOCK_M, BLOCK_D, HEAD_DIM)
            tile_dout = load_block(
                dout, dout_descriptor, b, h, row, live_q, EDGE, FILLED, BLOCK_M, BLOCK_DV, HEAD_DIM_V
            )
            row_lse = reference_of(load_row(lse, b, h, row, live_q, -float("inf"), BLOCK_M), PLAIN)[None, :]
            row_delta = load_row(delta, b, h, row, live_q, 0.0, BLOCK_M)[None, :]
            products = dot(tile_k, tl.trans(tile_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            x, slope = logits(products, terms, s, b, h, i0, j0, origin, PLAIN, EDGE, KEYS_DOWN=True)
            p = probabilities(x, row_lse, terms, PLAIN)
            dp = dot(tile_v, tl.trans(tile_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            dropped = p
            if dropout is not None:
                # As bytes: the compiler cannot transpose booleans through shared memory (Triton 3.9).
                keep = tl.trans(kept(dropout, b, h, i0, j0, BLOCK_M, BLOCK_N).to(tl.int8)) != 0
                dropped = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
            acc_v = dot(dropped.to(tile_dout.dtype), tile_dout, acc_v)
            ds = p * (dp - row_delta) * slope
            acc_k = dot(ds.to(tile_q.dtype), tile_q, acc_k)
    store(dk, b, kv_head, s.row_k + j0, live, acc_k * terms.scale, BLOCK_N, BLOCK_D, HEAD_DIM)
    if dropout is not None:
        acc_v *= dropout.keep_scale
    store(dv, b, kv_head, s.row_k + j0, live, acc_v, BLOCK_N, BLOCK_DV, HEAD_DIM_V)


@triton.jit(do_not_specialize=["batch_size", "rows"])
def dsink_kernel(lse, delta, sink, dsink, batch_size, rows, ROWS: tl.constexpr):
    """One program a head: -sum of exp(sink - lse) * delta over every row of every sequence, in a fixed order."""
    h = tl.program_id(0)
    logit = tl.load(sink + h)
    acc = tl.zeros([ROWS], tl.float32)
    for b in range(0, batch_size):
        for row in range(0, rows, ROWS):
            row_lse = reference_of(load_row(lse, b, h, row, rows - row, -float("inf"), ROWS), PLAIN=False)
            acc -= tl.exp2((logit - row_lse) * LOG2E) * load_row(delta, b, h, row, rows - row, 0.0, ROWS)
    tl.store(dsink + h, tl.sum(acc, 0))
