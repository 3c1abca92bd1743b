"""dS of one tile, formed from nothing but the inputs and lse: for gradients that are sums of scores' gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import kept_at
from .span import bias_origin, visible
from .tile import dot, load_between, load_row, logits, probabilities, reference_of


@triton.jit
def score_gradient(
    q, k, v, dout, lse, delta, lengths, terms, dropout, s, b, h, group, i0, j0,
    PLAIN: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) for rows i0.. and keys j0.. of sequence s, which may reach beyond it at either end; 0 where nothing is seen."""
    i, j = i0 + tl.arange(0, BLOCK_M)[:, None], j0 + tl.arange(0, BLOCK_N)[None, :]
    row_q, row_k, kv_head = s.row_q + i0, s.row_k + j0, h // group
    tile_q = load_between(q, b, h, row_q, -i0, s.len_q - i0, BLOCK_M, BLOCK_D, HEAD_DIM)
    tile_k = load_between(k, b, kv_head, row_k, -j0, s.len_k - j0, BLOCK_N, BLOCK_D, HEAD_DIM)
    products = dot(tile_q, tl.trans(tile_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    x, _ = logits(products, terms, s, b, h, i0, j0, bias_origin(lengths, s), PLAIN, EDGE=False, KEYS_DOWN=False)
    x = tl.where((i >= 0) & (i < s.len_q) & (j >= 0) & visible(s, i, j), x, -float("inf"))
    # Rows outside the sequence have lse = -inf and delta = 0, those stored before it too.
    row_lse = reference_of(load_row(lse, b, h, row_q, s.len_q - i0, -float("inf"), BLOCK_M), PLAIN)
    p = probabilities(x, row_lse[:, None], terms, PLAIN)

    tile_dout = load_between(dout, b, h, row_q, -i0, s.len_q - i0, BLOCK_M, BLOCK_DV, HEAD_DIM_V)
    tile_v = load_between(v, b, kv_head, row_k, -j0, s.len_k - j0, BLOCK_N, BLOCK_DV, HEAD_DIM_V)
    dp = dot(tile_dout, tl.trans(tile_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if dropout is not None:
        dp = tl.where(kept_at(dropout, b, h, i, j), dp * dropout.keep_scale, 0.0)
    return p * (dp - load_row(delta, b, h, row_q, s.len_q - i0, 0.0, BLOCK_M)[:, None])
