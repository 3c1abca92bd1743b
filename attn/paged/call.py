"""One call over a paged KV cache: the arguments that the operators, the checks and every backend share, in order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FIXED_SPLIT = 2048  # keys of a part where parts must not depend on the batch; csrc/common/plan.h
MAX_PAGE_SIZE = 256


class PagedCall(NamedTuple):
    """q (total, Hq, D) against the pages of each sequence; the last query of a sequence stands at its last key."""

    q: Tensor
    k_pages: Tensor  # (num_pages, page_size, Hkv, D), q's dtype, int8 or float8_e4m3fn
    v_pages: Tensor  # (num_pages, page_size, Hkv, Dv)
    block_table: Tensor  # int32 (B, max_pages)
    seqlens_k: Tensor  # int32 (B,)
    cu_seqlens_q: Tensor | None  # int32 (B+1,); None: one query a sequence
    max_seqlen_q: int
    prefix: Tensor | None  # int32 (B,)
    left: int | None
    right: int | None
    top_left: bool
    bias: Tensor | None  # (B, Hq, max_seqlen_q, max_seqlen_k), any of them 1; bool or floating
    distance_bias: Tensor | None  # (Hq, 2R+1) float32
    alibi_slopes: Tensor | None  # (Hq,) float32
    row_distance_bias: Tensor | None  # (B, Hq, max_seqlen_q, 2R+1)
    col_distance_bias: Tensor | None  # (B, Hq, max_seqlen_k, 2R+1)
    sink: Tensor | None  # (Hq,) float32
    k_scales: Tensor | None  # float32, (num_pages, page_size, Hkv), any of them 1
    v_scales: Tensor | None
    rope_cos: Tensor | None  # float32 (max_positions, R), of the first 2R dimensions of a head
    rope_sin: Tensor | None
    rope_interleaved: bool
    scale: float | None  # None: D ** -0.5
    softcap: float  # 0: none
    batch_invariant: bool
    plan: Tensor | None  # int32 (rows, 8), see csrc/common/plan.h

    @property
    def batch(self) -> int:
        return self.block_table.shape[0]

    @property
    def longest(self) -> int:
        """Keys that a row of the block table can hold."""
        return self.block_table.shape[1] * self.k_pages.shape[1]


class AppendCall(NamedTuple):
    """New keys and values on their way into the pages."""

    k: Tensor  # (total, Hkv, D)
    v: Tensor  # (total, Hkv, Dv)
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor  # int32 (B, max_pages)
    positions: Tensor  # int32 (total,), -1: skip the token
    cu_seqlens: Tensor | None  # int32 (B+1,); None: one token a sequence
    rope_cos: Tensor | None
    rope_sin: Tensor | None
    rope_interleaved: bool
    k_scales: Tensor | None
    v_scales: Tensor | None
