"""One call of attention: the arguments that the operators, the checks and every backend share, in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GRADIENTS = ("q", "k", "v", "bias", "distance_bias", "row_distance_bias", "col_distance_bias", "sink")


class Call(NamedTuple):
    """Dense: q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv). Packed: all rows in one dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None  # int32 (B+1,), of a packed call
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqlens_q: Tensor | None  # int32 (B,), and so the next three
    seqlens_k: Tensor | None
    starts_q: Tensor | None
    starts_k: Tensor | None
    prefix: Tensor | None  # int32 (B,)
    left: int | None
    right: int | None
    top_left: bool
    bias: Tensor | None  # (B, Hq, Sq, Sk), any of them 1; bool or floating
    distance_bias: Tensor | None  # (Hq, 2R+1) float32
    alibi_slopes: Tensor | None  # (Hq,) float32
    row_distance_bias: Tensor | None  # (B, Hq, Sq, 2R+1)
    col_distance_bias: Tensor | None  # (B, Hq, Sk, 2R+1)
    sink: Tensor | None  # (Hq,) float32
    scale: float | None  # None: D ** -0.5
    softcap: float  # 0: none
    dropout_p: float
    seed: Tensor | None  # int64 (1,), with dropout only
    deterministic: bool
    batch_invariant: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32
