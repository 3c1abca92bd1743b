"""Peers of sequences of many lengths: SDPA on the padded batch, and what takes packed rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..check import seen
from ..workload import Peer, Workload
from . import FLASH_ATTENTION, module, require
from .dense import Makers, _first

PADDED = {
    "padded sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "padded sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "padded sdpa math": SDPBackend.MATH,
}


def forward(w: Workload, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, lens: list[int]) -> Makers:
    kept = torch.arange(w.queries, device=q.device) < torch.tensor(lens, device=q.device)[:, None]
    given = (q, k, v, cu)
    found: Makers = {name: partial(_padded, w, (q, k, v), kept, backend) for name, backend in PADDED.items()}
    found["varlen_attn"] = partial(_varlen_attn, w, given)
    found["flashinfer"] = partial(_flashinfer, w, given)
    return found | {name: partial(_flash, w, given, name) for name in FLASH_ATTENTION}


def _padded(w: Workload, packed: tuple[Tensor, ...], kept: Tensor, backend: SDPBackend) -> Peer:
    """The batch as it is without unpadding: (B, H, S, D) and a mask of the tokens, made beforehand."""
    padded = []
    for x in packed:
        rows = x.new_zeros(*kept.shape, *x.shape[1:])
        rows[kept] = x
        padded.append(rows.transpose(1, 2))
    mask = kept[:, None, None, :]
    if w.right is not None or w.left is not None:
        rows = torch.arange(w.queries, device=kept.device)
        mask = seen(rows, w.queries, w.queries, w.prefix, w.left, w.right)  # right padding: no token sees it
        mask = mask[None, None]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*padded, mask, enable_gqa=w.heads != w.kv)

    return Peer(call, lambda out: out.transpose(1, 2)[kept])


def _varlen_attn(w: Workload, given: tuple[Tensor, ...]) -> Peer:
    function = module("torch.nn.attention.varlen").varlen_attn
    q, k, v, cu = given
    return Peer(_with_span(w, partial(function, q, k, v, cu, cu, w.queries, w.queries)))


def _with_span(w: Workload, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """Its first releases say is_causal, later ones have a window."""
    require(w.prefix == 0, "it has no prefix")
    if w.left is None and w.right is None:
        return function
    window = (-1 if w.left is None else w.left, -1 if w.right is None else w.right)
    try:
        function(window_size=window)
    except TypeError:
        require(window == (-1, 0), "this release has no windows")
        return partial(function, is_causal=True)
    return partial(function, window_size=window)


def _flash(w: Workload, given: tuple[Tensor, ...], name: str) -> Peer:
    function = module(FLASH_ATTENTION[name]).flash_attn_varlen_func
    require(w.prefix == 0 and w.left is None and w.right in (None, 0), "this span was not tried with it")
    q, k, v, cu = given
    call = partial(
        function, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=w.queries, max_seqlen_k=w.queries,
        causal=w.right == 0,
    )  # fmt: skip
    return Peer(call, _first)


def _flashinfer(w: Workload, given: tuple[Tensor, ...]) -> Peer:
    """Its plan is made beforehand: a step has one for all layers."""
    flashinfer = module("flashinfer")
    require(w.prefix == 0 and w.left is None and w.right in (None, 0), "this span was not tried with it")
    q, k, v, cu = given
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(cu, cu, w.heads, w.kv, w.head_dim, causal=w.right == 0, q_data_type=w.dtype, kv_data_type=w.dtype)
    return Peer(partial(wrapper.run, q, k, v))
