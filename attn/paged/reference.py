"""The paged calls as formulas, any dtype: pages gathered to rows and dequantised, then `reference.attention_forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..call import Call
from .call import AppendCall, PagedCall
from .checks import QUANTISED, is_set, slots


def paged_attention(*arguments: Any) -> None:
    *given, out, lse = arguments
    call = PagedCall._make(given)
    q = rotated_queries(call)
    cu_seqlens_q = call.cu_seqlens_q
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(call.batch + 1, dtype=torch.int32, device=q.device)
    k = gathered(call.k_pages, call.k_scales, call.block_table, call.seqlens_k, q.dtype)
    v = gathered(call.v_pages, call.v_scales, call.block_table, call.seqlens_k, q.dtype)
    cu_seqlens_k = torch.nn.functional.pad(call.seqlens_k.cumsum(0, dtype=torch.int32), (1, 0))
    dense = Call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, call.max_seqlen_q, call.longest, None, None, None, None, call.prefix,
        call.left, call.right, call.top_left, call.bias, call.distance_bias, call.alibi_slopes, call.row_distance_bias,
        call.col_distance_bias, call.sink, call.scale, call.softcap, 0.0, None, False, call.batch_invariant,
    )  # fmt: skip
    found_out, found_lse = reference.attention_forward(*dense)
    out.copy_(found_out)
    lse.copy_(found_lse)


def gathered(pages: Tensor, scales: Tensor | None, block_table: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """(sum of lengths, heads_kv, head_dim): the keys or values of all sequences, one after another."""
    position = torch.arange(block_table.shape[1] * pages.shape[1], device=pages.device)
    page, offset = block_table[:, position // pages.shape[1]].long(), position % pages.shape[1]
    inside = position < lengths[:, None]
    page, offset = page[inside], offset.expand_as(inside)[inside]
    rows = pages[page, offset]
    if pages.dtype not in QUANTISED:
        return rows
    exact = torch.promote_types(dtype, torch.float32)
    rows = rows.to(exact)
    return (rows if scales is None else rows * scales.expand(pages.shape[:3])[page, offset][..., None]).to(dtype)


def rotated_queries(call: PagedCall) -> Tensor:
    """q by each token's position in its sequence; a sequence's last query stands at its last key."""
    if call.rope_cos is None or call.rope_sin is None:
        return call.q
    token = torch.arange(call.q.shape[0], device=call.q.device)
    if call.cu_seqlens_q is None:
        position = call.seqlens_k.long() - 1
    else:
        sequence = torch.searchsorted(call.cu_seqlens_q[1:].long(), token, right=True)
        last = torch.nn.functional.pad((call.seqlens_k - call.cu_seqlens_q[1:]).long(), (0, 1))
        position = token + last[sequence.clamp(max=call.batch)]
    return rotate(call.q, position, call.rope_cos, call.rope_sin, call.rope_interleaved)


def rotate(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (total, heads, D) with pairs of its first 2R dimensions turned; a position outside the tables turns by the nearest."""
    if len(cos) == 0:
        return x
    position = position.clamp(0, len(cos) - 1)
    c, s = (t[position][:, None].to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))  # (total, 1, R)
    reach = 2 * cos.shape[1]
    turned = x[..., :reach].to(c.dtype)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    both = (a * c - b * s, b * c + a * s)
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat((turned.to(x.dtype), x[..., reach:]), -1)


def paged_append(*arguments: Any) -> None:
    call = AppendCall._make(arguments)
    k = call.k
    if call.rope_cos is not None and call.rope_sin is not None:
        k = rotate(k, call.positions.long(), call.rope_cos, call.rope_sin, call.rope_interleaved)
    place = slots(call)
    live = place >= 0
    page, offset = place[live] // call.k_pages.shape[1], place[live] % call.k_pages.shape[1]
    for x, pages, scales in ((k, call.k_pages, call.k_scales), (call.v, call.v_pages, call.v_scales)):
        pages[page, offset] = stored(x[live], pages, scales, page, offset)


def stored(x: Tensor, pages: Tensor, scales: Tensor | None, page: Tensor, offset: Tensor) -> Tensor:
    """x (n, heads_kv, D) as the pages hold it; sets its scales where there is one a token."""
    if pages.dtype not in QUANTISED or scales is None:
        return x.to(pages.dtype)
    largest = QUANTISED[pages.dtype]
    x = x.float()
    if is_set(scales, pages):
        scales[page, offset] = x.abs().amax(-1) / largest
    scale = scales.expand(pages.shape[:3])[page, offset][..., None]
    x = torch.where(scale > 0, x / scale, 0).clamp(-largest, largest)
    return (x.round() if pages.dtype == torch.int8 else x).to(pages.dtype)


def copy_pages(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    for x in (k_pages, v_pages, k_scales, v_scales):
        if x is not None and x.shape[0] == k_pages.shape[0]:
            x[dst.long()] = x[src.long()]
