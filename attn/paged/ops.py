"""The torch operators of the paged cache: schemas, implementations and fakes. They write in place and have no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import check_name, choose_append, choose_copy, choose_paged
from ..checks import contents_are_readable, read_in_order
from . import checks
from .call import AppendCall, PagedCall

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("duplex_attn", "FRAGMENT")
_library.define(
    """paged_attention(
    Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seqlens_k,
    Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? prefix, SymInt? left, SymInt? right, bool top_left,
    Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, Tensor? row_distance_bias, Tensor? col_distance_bias,
    Tensor? sink, Tensor? k_scales, Tensor? v_scales, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved,
    float? scale, float softcap, bool batch_invariant, Tensor? plan, Tensor(a!) out, Tensor(b!) lse, str backend
) -> ()""",
    tags=_TAGS,
)
_library.define(
    """paged_append(
    Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor positions,
    Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved,
    Tensor(c!)? k_scales, Tensor(d!)? v_scales, str backend
) -> ()""",
    tags=_TAGS,
)
_library.define(
    """copy_pages(
    Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor src, Tensor dst, Tensor(c!)? k_scales, Tensor(d!)? v_scales,
    str backend
) -> ()""",
    tags=_TAGS,
)
paged_attention = torch.ops.duplex_attn.paged_attention.default
paged_append = torch.ops.duplex_attn.paged_append.default
copy_pages = torch.ops.duplex_attn.copy_pages.default


_IN_ORDER = [PagedCall._fields.index(name) for name in (
    "seqlens_k", "cu_seqlens_q", "prefix", "distance_bias", "alibi_slopes", "sink",
)]  # fmt: skip
_APPEND_IN_ORDER = [AppendCall._fields.index(name) for name in ("positions", "cu_seqlens")]


def _attention(*arguments: Any) -> None:
    *given, out, lse, name = arguments
    call = PagedCall._make(given)
    checks.check_attention(call, out, lse)
    backend = choose_paged(call, name)
    if contents_are_readable(call.q) and not backend.checks_paged_contents:
        checks.check_attention_contents(call)
    call = read_in_order(call, _IN_ORDER)
    if call.q.stride(2) != 1 and call.q.shape[2] > 1:
        call = call._replace(q=call.q.contiguous())
    backend.paged_attention(*call, out, lse)
    increment_version((out, lse))


def _append(*arguments: Any) -> None:
    *given, name = arguments
    call = AppendCall._make(given)
    checks.check_append(call)
    backend = choose_append(call, name)
    if contents_are_readable(call.k) and not backend.checks_paged_contents:
        checks.check_append_contents(call)
    call = read_in_order(call, _APPEND_IN_ORDER)
    if call.k.stride(2) != 1 or call.v.stride(2) != 1:
        call = call._replace(k=call.k.contiguous(), v=call.v.contiguous())
    backend.paged_append(*call)
    increment_version(_written(*call[2:4], call.k_scales, call.v_scales))


def _copy(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None, v_scales: Tensor | None,
    name: str,
) -> None:  # fmt: skip
    checks.check_copy(k_pages, v_pages, src, dst, k_scales, v_scales)
    if contents_are_readable(k_pages):
        checks.check_copy_contents(src, dst, k_pages.shape[0])
    backend = choose_copy(k_pages, v_pages, src, name)
    backend.copy_pages(k_pages, v_pages, src.contiguous(), dst.contiguous(), k_scales, v_scales)
    increment_version(_written(k_pages, v_pages, k_scales, v_scales))


def _written(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


for _name, _implementation in (("paged_attention", _attention), ("paged_append", _append), ("copy_pages", _copy)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("duplex_attn::paged_attention", lib=_library)
def _(*arguments):
    *given, out, lse, name = arguments
    checks.check_attention(PagedCall._make(given), out, lse)
    check_name(name)


@torch.library.register_fake("duplex_attn::paged_append", lib=_library)
def _(*arguments):
    checks.check_append(AppendCall._make(arguments[:-1]))
    check_name(arguments[-1])


@torch.library.register_fake("duplex_attn::copy_pages", lib=_library)
def _(k_pages, v_pages, src, dst, k_scales, v_scales, name):
    checks.check_copy(k_pages, v_pages, src, dst, k_scales, v_scales)
    check_name(name)
