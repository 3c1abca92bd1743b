"""The calls of the package: give every argument its meaning and hand it to the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .mask import Mask, full

_FULL = full()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = _FULL,
    *,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    row_distance_bias: Tensor | None = None,
    col_distance_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    return _attention(
        q, k, v, None, None, q.shape[1], k.shape[1], q.shape[0], mask, seqlens_q, seqlens_k, starts_q, starts_k, bias,
        distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap, dropout_p, seed,
        return_lse, deterministic, batch_invariant, backend,
    )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: Mask = _FULL,
    *,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    row_distance_bias: Tensor | None = None,
    col_distance_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, cu_seqlens_q.shape[0] - 1, mask, None, None,
        None, None, bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap,
        dropout_p, seed, return_lse, deterministic, batch_invariant, backend,
    )  # fmt: skip


def merge_attention(
    outs: list[Tensor], lses: list[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return ops.merge_attention(list(outs), list(lses), backend or "")


def _attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, batch, mask, seqlens_q, seqlens_k, starts_q,
    starts_k, bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap, dropout_p,
    seed, return_lse, deterministic, batch_invariant, backend,
):  # fmt: skip
    prefix, left, right, align = mask
    if not isinstance(prefix, Tensor):
        prefix = torch.full((batch,), prefix, dtype=torch.int32, device=q.device) if prefix else None
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    table = torch.float64 if q.dtype == torch.float64 else torch.float32
    if distance_bias is not None:
        distance_bias = distance_bias.to(table).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(table).contiguous()
    if sink is not None:
        sink = sink.to(table).contiguous()
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=q.device)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out, lse = ops.attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_q, seqlens_k, starts_q, starts_k,
        prefix, left, right, align == "top_left", bias, distance_bias, alibi_slopes, row_distance_bias,
        col_distance_bias, sink, scale, softcap, dropout_p, seed, deterministic, batch_invariant, backend or "",
    )  # fmt: skip
    return (out, lse) if return_lse else out
