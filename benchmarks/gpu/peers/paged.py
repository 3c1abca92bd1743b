"""Peers of calls over pages: flashinfer, flash-attn, torch's varlen_attn, and SDPA on keys that lie in a row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families.pages import Pool
from ..workload import Peer, Workload
from . import module, require
from .dense import Makers, _first

WORKSPACE = 256 * 2**20  # bytes


def attention(w: Workload, q: Tensor, pool: Pool, slopes: Tensor | None) -> Makers:
    return {
        "sdpa, keys in a row": partial(_in_a_row, w, q, pool),
        "varlen_attn": partial(_varlen_attn, w, q, pool),
        "flashinfer": partial(_flashinfer, w, q, pool),
        "flash-attn 2": partial(_flash, w, q, pool, slopes, "flash_attn"),
        "flash-attn 3": partial(_flash, w, q, pool, slopes, "flash_attn_interface"),
    }


def _as_pages(w: Workload) -> None:
    require(w.stored is None, "its quantised caches are others")


def _without_terms(w: Workload) -> None:
    require(not w.terms, "its scores have no such term")


def _in_a_row(w: Workload, q: Tensor, pool: Pool) -> Peer:
    """What paging is held against: the same keys, one after another."""
    _as_pages(w)
    _without_terms(w)
    require(w.queries == 1, "is_causal stands at the top left")
    rows = pool.block_table.long()
    k, v = (pages[rows].flatten(1, 2)[:, : w.len_k].transpose(1, 2) for pages in (pool.k_pages, pool.v_pages))
    call = partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=w.heads != w.kv)
    return Peer(call, lambda out: out[:, :, 0])


def _cu(w: Workload, q: Tensor) -> Tensor:
    return torch.arange(w.batch + 1, dtype=torch.int32, device=q.device) * w.queries


def _varlen_attn(w: Workload, q: Tensor, pool: Pool) -> Peer:
    _as_pages(w)
    _without_terms(w)
    function = module("torch.nn.attention.varlen").varlen_attn
    call = partial(
        function, q, pool.k_pages, pool.v_pages, _cu(w, q), None, w.queries, w.len_k, window_size=(-1, 0),
        enable_gqa=w.heads != w.kv, seqused_k=pool.seqlens_k, block_table=pool.block_table,
    )  # fmt: skip
    return Peer(_or_without(call, "block_table"))


def _or_without(call: Callable[[], Tensor], argument: str) -> Callable[[], Tensor]:
    """The call, unless this release does not know the argument."""
    try:
        call()
    except TypeError as error:
        require(argument not in str(error) and "unexpected keyword" not in str(error), f"this release: {error}")
        raise
    return call


def _flash(w: Workload, q: Tensor, pool: Pool, slopes: Tensor | None, name: str) -> Peer:
    _as_pages(w)
    function = module(name).flash_attn_with_kvcache
    given = {"block_table" if name == "flash_attn" else "page_table": pool.block_table}
    if slopes is not None:
        require(name == "flash_attn", "its scores have no such term")
        given["alibi_slopes"] = slopes
    call = partial(
        function, q.view(w.batch, w.queries, w.heads, w.head_dim), pool.k_pages, pool.v_pages,
        cache_seqlens=pool.seqlens_k, causal=True, **given,
    )  # fmt: skip
    return Peer(call, lambda found: _first(found).flatten(0, 1))


def _flashinfer(w: Workload, q: Tensor, pool: Pool) -> Peer:
    """Its plan is made beforehand: a step has one for all layers."""
    _as_pages(w)
    _without_terms(w)
    flashinfer = module("flashinfer")
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device)
    each = pool.block_table.shape[1]
    starts = torch.arange(w.batch + 1, dtype=torch.int32, device=q.device) * each
    last = torch.full((w.batch,), (w.len_k - 1) % w.page_size + 1, dtype=torch.int32, device=q.device)
    pages = pool.block_table.flatten()
    if w.queries == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(
            starts, pages, last, w.heads, w.kv, w.head_dim, w.page_size, q_data_type=w.dtype, kv_data_type=w.dtype
        )
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            _cu(w, q), starts, pages, last, w.heads, w.kv, w.head_dim, w.page_size, causal=True, q_data_type=w.dtype,
            kv_data_type=w.dtype,
        )  # fmt: skip
    return Peer(partial(wrapper.run, q, (pool.k_pages, pool.v_pages)))
