"""Small calls, one for every optional argument, as the operators take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duplex_attn as da
import pytest
import torch
from torch import Tensor

HEADS, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 4, 2, 8, 6
BATCH, SEQLEN_Q, SEQLEN_K = 2, 5, 7
FORWARD = torch.ops.duplex_attn.attention_forward.default
BACKWARD = torch.ops.duplex_attn.attention_backward.default
MERGE = torch.ops.duplex_attn.merge_attention.default
GRADIENTS = ("q", "k", "v", "bias", "distance_bias", "row_distance_bias", "col_distance_bias", "sink")
NAMES = [argument.name for argument in FORWARD._schema.arguments]
OFF = {"top_left": False, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False, "batch_invariant": False}

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not status.available, reason=status.detail))
    for name, status in da.backends().items()
    if name != "triton"
]


def int32(*entries: int) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def dense(dtype: torch.dtype = torch.float32, **given: Any) -> dict[str, Any]:
    """Named arguments of attention_forward: two sequences, grouped heads, v with its own head_dim."""
    call = {
        "q": leaf(BATCH, SEQLEN_Q, HEADS, HEAD_DIM, dtype=dtype),
        "k": leaf(BATCH, SEQLEN_K, HEADS_KV, HEAD_DIM, dtype=dtype),
        "v": leaf(BATCH, SEQLEN_K, HEADS_KV, HEAD_DIM_V, dtype=dtype),
        "max_seqlen_q": SEQLEN_Q,
        "max_seqlen_k": SEQLEN_K,
    }
    return dict.fromkeys(NAMES) | OFF | call | given


def packed(dtype: torch.dtype = torch.float32, **given: Any) -> dict[str, Any]:
    """Three sequences, one of them without queries, and a row of q past the last."""
    call = {
        "q": leaf(6, HEADS, HEAD_DIM, dtype=dtype),
        "k": leaf(8, HEADS_KV, HEAD_DIM, dtype=dtype),
        "v": leaf(8, HEADS_KV, HEAD_DIM_V, dtype=dtype),
        "cu_seqlens_q": int32(0, 3, 3, 5),
        "cu_seqlens_k": int32(0, 2, 5, 8),
        "max_seqlen_q": 4,
        "max_seqlen_k": 3,
    }
    return dict.fromkeys(NAMES) | OFF | call | given


def with_bias(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"bias": torch.rand(shape) < 0.7 if dtype == torch.bool else leaf(*shape, dtype=dtype)}


DENSE: dict[str, Callable[[], dict[str, Any]]] = {
    "full": dense,
    "float16": lambda: dense(torch.float16),
    "bfloat16": lambda: dense(torch.bfloat16),
    "causal": lambda: dense(right=0),
    "prefix": lambda: dense(prefix=int32(0, 3), right=0),
    "window": lambda: dense(left=2, right=1),
    "top_left": lambda: dense(top_left=True, right=0),
    "sees_nothing": lambda: dense(left=-9),
    "seqlens": lambda: dense(seqlens_q=int32(3, 5), seqlens_k=int32(7, 0)),
    "seqlens_k": lambda: dense(seqlens_k=int32(7, 2)),
    "starts": lambda: dense(
        seqlens_q=int32(3, 5), seqlens_k=int32(4, 6), starts_q=int32(2, 0), starts_k=int32(3, 1), right=0
    ),
    "bias": lambda: dense(**with_bias((BATCH, HEADS, SEQLEN_Q, SEQLEN_K))),
    "bias_bfloat16": lambda: dense(**with_bias((BATCH, HEADS, SEQLEN_Q, SEQLEN_K), torch.bfloat16)),
    "bias_broadcast": lambda: dense(**with_bias((1, HEADS, 1, SEQLEN_K))),
    "bias_bool": lambda: dense(**with_bias((BATCH, 1, SEQLEN_Q, SEQLEN_K), torch.bool)),
    "distance_bias": lambda: dense(distance_bias=leaf(HEADS, 5), deterministic=True),
    "alibi_slopes": lambda: dense(alibi_slopes=torch.rand(HEADS)),
    "sink": lambda: dense(sink=leaf(HEADS)),
    "scale": lambda: dense(scale=0.3),
    "softcap": lambda: dense(softcap=2.0),
    "dropout": lambda: dense(dropout_p=0.4, seed=torch.tensor([-3])),
    "deterministic": lambda: dense(deterministic=True),
    "batch_invariant": lambda: dense(batch_invariant=True),
    "transposed": lambda: dense(q=leaf(BATCH, HEADS, SEQLEN_Q, HEAD_DIM).transpose(1, 2)),
    "strided_rows": lambda: dense(k=leaf(BATCH, SEQLEN_K, HEADS_KV, 2 * HEAD_DIM)[..., ::2]),
}
PACKED: dict[str, Callable[[], dict[str, Any]]] = {
    "packed": packed,
    "packed_causal": lambda: packed(right=0, prefix=int32(0, 1, 2)),
    "packed_bias": lambda: packed(**with_bias((3, HEADS, 4, 3))),
    "packed_everything": lambda: packed(
        **with_bias((1, 1, 4, 3)),
        distance_bias=leaf(HEADS, 3),
        alibi_slopes=torch.rand(HEADS),
        sink=leaf(HEADS),
        softcap=3.0,
        dropout_p=0.2,
        seed=torch.tensor([5]),
    ),
}
REFERENCE_ONLY: dict[str, Callable[[], dict[str, Any]]] = {
    "float64": lambda: dense(torch.float64),
    "row_distance_bias": lambda: dense(row_distance_bias=leaf(BATCH, HEADS, SEQLEN_Q, 5)),
    "col_distance_bias": lambda: dense(col_distance_bias=leaf(BATCH, HEADS, SEQLEN_K, 3)),
    "packed_row_distance_bias": lambda: packed(row_distance_bias=leaf(3, HEADS, 4, 5)),
}
CALLS = DENSE | PACKED
EVERY_CALL = [
    *(pytest.param(name, *backend.values, marks=backend.marks, id=f"{name}-{backend.values[0]}")
      for name in CALLS for backend in BACKENDS),
    *(pytest.param(name, "reference", id=f"{name}-reference") for name in REFERENCE_ONLY),
]  # fmt: skip


def made(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return (CALLS | REFERENCE_ONLY)[name]()
