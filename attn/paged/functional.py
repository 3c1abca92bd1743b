"""The paged calls of the package: each argument is given its meaning here and handed to the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS, Workers
from ..checks import check_per_sequence, wrong_type, wrong_value
from ..functional import check_numbers, check_tensor, four_dims, named_mask, prefix_tensor, run_operator, table
from ..mask import Mask, causal
from .call import FIXED_SPLIT
from .checks import QUANTISED, check_plan_tensors, on_host
from .ops import copy_pages as _copy
from .ops import paged_append as _append
from .ops import paged_attention as _operator

_CAUSAL = causal()


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    mask: Mask = _CAUSAL,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_interleaved: bool = False,
    plan: Tensor | None = None,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    row_distance_bias: Tensor | None = None,
    col_distance_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of new tokens over the pages that hold their sequences' keys and values (PagedAttention, SOSP 2023).

    q (total, Hq, D): one token a sequence (decode), or with cu_seqlens_q int32 (B+1,) and max_seqlen_q several (chunked
        prefill), or both mixed. A sequence's last query stands at its last key.
    k_pages (num_pages, page_size, Hkv, D), v_pages (num_pages, page_size, Hkv, Dv): q's dtype, int8 or float8_e4m3fn;
        any strides with a contiguous last dimension. Slots past a sequence's length may hold anything.
    k_scales, v_scales: float32, broadcast to (num_pages, page_size, Hkv): what a stored number is worth.
    block_table int32 (B, max_pages): key j of sequence b lies in slot j % page_size of page
        block_table[b, j // page_size]. seqlens_k int32 (B,): keys of each sequence, those appended in this step included.
    rope_cos, rope_sin: float32 (max_positions, R): rotates the first 2R dimensions of q by its position in the
        sequence (RoFormer, Su et al. 2021), pairs (x, x + R), or (2x, 2x + 1) where rope_interleaved.
    plan: the step's division of work, from `PagedKVCache.batch(...).plan(mask)`; None makes one for this call.
    out: (total, Hq, Dv), written and returned; None makes one. Under autocast q is cast to the pages' dtype, or to
        autocast's where they hold bytes, and out is of that dtype.
    bias broadcasts to (B, Hq, max_seqlen_q, max_pages * page_size), indexed by i and j. All else as in `attention`, without
    gradients and dropout; a row that sees nothing has out 0 and lse -inf.

    Returns out, and with return_lse also lse (Hq, total) float32. Raises ValueError or TypeError, naming the argument.
    """
    _check_tensors(q=q, k_pages=k_pages, v_pages=v_pages, block_table=block_table, seqlens_k=seqlens_k)
    _check_no_gradient(
        q=q, k_pages=k_pages, v_pages=v_pages, bias=bias, distance_bias=distance_bias, alibi_slopes=alibi_slopes,
        row_distance_bias=row_distance_bias, col_distance_bias=col_distance_bias, sink=sink, out=out,
    )  # fmt: skip
    if not ((scale is None or type(scale) is float) and type(softcap) is float):
        check_numbers(scale=scale, softcap=softcap)
    (q,) = _autocast(k_pages, q)
    prefix, left, right, top_left = named_mask(mask)
    if not isinstance(prefix, Tensor):
        prefix = None if prefix == 0 else prefix_tensor(prefix, len(block_table) if block_table.dim() else 0, q)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if cu_seqlens_q is None:
        max_seqlen_q = 1
    elif max_seqlen_q is None:
        wrong_type("max_seqlen_q", "an int with cu_seqlens_q", None)
    if out is None:
        out = q.new_empty(*q.shape[:-1], *v_pages.shape[3:])
    lse = q.new_empty(q.shape[1::-1], dtype=exact)
    arguments = (
        q, k_pages, v_pages, block_table, seqlens_k, cu_seqlens_q, max_seqlen_q, prefix, left, right, top_left,
        None if bias is None else four_dims(bias), table("distance_bias", distance_bias, exact),
        table("alibi_slopes", alibi_slopes, exact), row_distance_bias, col_distance_bias, table("sink", sink, exact),
        k_scales, v_scales, rope_cos, rope_sin, rope_interleaved, scale, softcap, batch_invariant, plan, out, lse,
        backend or "",
    )  # fmt: skip
    run_operator(_operator, arguments)
    return (out, lse) if return_lse else out


def plan(
    block_table: Tensor,
    seqlens_k: Tensor,
    page_size: int,
    mask: Mask = _CAUSAL,
    *,
    cu_seqlens_q: Tensor | None = None,
    batch_invariant: bool = False,
    workers: Workers | None = None,
) -> Tensor | None:
    """How a step's work is divided, for every layer's `paged_attention` of this batch and mask.

    int32 (rows, 8), from tensors on the CPU as `paged_attention` takes them, for `workers` (None: the CPU kernels'); any
    backend can follow it. None where the C++ library is missing, and each call then divides its own. Its layout is
    that of csrc/common/plan.h. Raises ValueError or TypeError, naming the argument.
    """
    _check_tensors(block_table=block_table, seqlens_k=seqlens_k)
    prefix, left, right, top_left = named_mask(mask)
    check_plan_tensors(block_table, seqlens_k, page_size, cu_seqlens_q)
    if not isinstance(prefix, Tensor):
        prefix = prefix_tensor(prefix, block_table.shape[0], seqlens_k) if prefix else None
    else:
        check_per_sequence("prefix", prefix, block_table.shape[0], block_table.device)
    if BACKENDS["cpu"].missing() is not None:
        return None
    tensors = on_host(block_table, seqlens_k, cu_seqlens_q, prefix)
    return torch.ops.duplex_attn_cpu.plan(
        *tensors, page_size, left, right, top_left, batch_invariant, *(workers or (0, 0))
    )


def plan_capacity(batch: int, tokens: int, longest: int, workers: Workers) -> int:
    """Rows that no plan of so many sequences, new tokens and keys a sequence exceeds: what a CUDA graph's buffer needs."""
    block_rows, number = workers
    blocks = batch + tokens // block_rows
    # Blocks of rows, and shared prefixes, are cut into parts: one each, those that keep 4 tiles for each worker, or of fixed length.
    parts = max(4 * number + 4 * blocks, blocks * (2 + longest // FIXED_SPLIT))
    return 1 + parts * max(1, min(block_rows, tokens)) + blocks


def paged_append(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_interleaved: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes new keys and values into the pages, in place: rotated, then quantised, where asked for.

    k (total, Hkv, D), v (total, Hkv, Dv): float32, float16 or bfloat16; pages as in `paged_attention`.
    positions int32 (total,): where in its sequence each token stands; -1 skips it. Token t belongs to sequence b with
        cu_seqlens[b] <= t < cu_seqlens[b + 1], int32 (B+1,); None: one token a sequence.
    rope_cos, rope_sin, rope_interleaved: as in `paged_attention`, of k.
    k_scales, v_scales: float32, for int8 and float8_e4m3fn pages. Of the full shape (num_pages, page_size, Hkv), each
        token's is set here to its largest magnitude over 127 or 448; one that broadcasts is read.
    Under autocast k and v are cast as q is in `paged_attention`.
    Raises ValueError or TypeError, naming the argument; nothing is written then.
    """
    _check_tensors(k=k, v=v, k_pages=k_pages, v_pages=v_pages, block_table=block_table, positions=positions)
    _check_no_gradient(k=k, v=v, k_pages=k_pages, v_pages=v_pages)
    k, v = _autocast(k_pages, k, v)
    arguments = (
        k, v, k_pages, v_pages, block_table, positions, cu_seqlens, rope_cos, rope_sin, rope_interleaved, k_scales,
        v_scales, backend or "",
    )  # fmt: skip
    run_operator(_append, arguments)


def copy_pages(
    k_pages: Tensor,
    v_pages: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Copies page src[n] to page dst[n], in place: what a copy-on-write fork needs.

    k_pages, v_pages: (num_pages, page_size, Hkv, D), any dtype. src, dst int32 (n,): no page is written twice, and none
    is both read and written. Scales are copied along where each page has its own. Raises ValueError or TypeError.
    """
    _check_tensors(k_pages=k_pages, v_pages=v_pages, src=src, dst=dst)
    _check_no_gradient(k_pages=k_pages, v_pages=v_pages)
    run_operator(_copy, (k_pages, v_pages, src, dst, k_scales, v_scales, backend or ""))


def _autocast(pages: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """Under autocast as pages hold numbers, or, where these are bytes, as autocast would have them."""
    device_type = pages.device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type) if pages.dtype in QUANTISED else pages.dtype
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _check_tensors(**arguments: Any) -> None:
    for name, x in arguments.items():
        check_tensor(name, x)


def _check_no_gradient(**arguments: Any) -> None:
    if torch.is_grad_enabled():
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.requires_grad:
                wrong_value(
                    name, "no gradients over pages: call it under torch.no_grad()", "a tensor that requires one"
                )
