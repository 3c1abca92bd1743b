"""Peers of dense calls: SDPA's four backends, FlexAttention, and flash-attn 2, 3 and 4."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from duplex_attn.profile.timing import wait
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..check import seen
from ..workload import Peer, Workload
from . import FLASH_ATTENTION, module, require

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
MATH_LIMIT = 2**33  # bytes of scores above which the formula has no room
Makers = dict[str, Callable[[], Peer]]


def forward(w: Workload, q: Tensor, k: Tensor, v: Tensor) -> Makers:
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    found: Makers = {name: partial(_sdpa, w, turned, name) for name in SDPA}
    if w.flex:
        found["flex"] = partial(_flex, w, turned)
    return found | {name: partial(_flash, w, (q, k, v), name) for name in FLASH_ATTENTION}


def backward(w: Workload, leaves: Sequence[Tensor], dout: Tensor) -> Makers:
    """Each one's own forward, made once, and then its backward alone."""

    def of(make: Callable[[], Peer]) -> Peer:
        peer = make()
        out = peer.answer(peer.call())  # (B, S, H, D), as dout lies
        return Peer(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))

    makers = forward(w, *leaves)
    return {name: partial(of, make) for name, make in makers.items()}


def biased(
    w: Workload, leaves: Sequence[Tensor], bias: Tensor, planes: Sequence[Callable[[Tensor], Tensor]], dout: Tensor
) -> Makers:
    """SDPA with the whole bias as a tensor, made of a table in every step, as T5 does: by the fastest of `planes`, since of a
    table's gradient, in which so many numbers come together, one way to form it may be many times as slow as another."""

    def whole(plane: Callable[[Tensor], Tensor]) -> Tensor:
        return plane(bias).to(w.dtype)[None].expand(w.batch, -1, -1, -1)

    return with_whole_bias(leaves, [bias], [partial(whole, plane) for plane in planes], dout)


def with_whole_bias(
    leaves: Sequence[Tensor], tables: Sequence[Tensor], wholes: Sequence[Callable[[], Tensor]], dout: Tensor
) -> Makers:
    """SDPA with what the fastest of `wholes` makes of the tables in every step, (B, H, Sq, Sk)."""

    def sdpa(backend: SDPBackend) -> Peer:
        def step(whole: Callable[[], Tensor]) -> tuple[Tensor, ...]:
            bias = whole()
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), bias)
            return torch.autograd.grad(out.transpose(1, 2), [*leaves, *tables], dout)

        return Peer(min((partial(step, whole) for whole in wholes), key=partial(_seconds, dout.device)))

    return {
        "sdpa with a bias": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa math with a bias": partial(sdpa, SDPBackend.MATH),
    }


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Of a call that is not the first."""
    call()
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def _sdpa(w: Workload, turned: list[Tensor], name: str) -> Peer:
    """is_causal where that is all that the span says, else a mask, which flash does not take."""
    causal = w.right == 0 and w.left is None and w.prefix == 0 and w.queries == w.len_k
    plain = w.right is None and w.left is None
    mask = None
    if name == "sdpa math":
        require(w.batch * w.heads * w.queries * w.len_k * 4 < MATH_LIMIT, "its scores alone would be gigabytes")
    if not causal and not plain:
        require(name != "sdpa flash", "it takes no mask")
        rows = torch.arange(w.queries, device=turned[0].device)
        mask = seen(rows, w.queries, w.len_k, w.prefix, w.left, w.right)[None, None]

    def call() -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(*turned, mask, is_causal=causal, enable_gqa=w.heads != w.kv)

    return Peer(call, _turned_back)


def _flex(w: Workload, turned: list[Tensor]) -> Peer:
    """Compiled anew for every mask and shape, which the time of its first call shows; as it is on a CPU. What was compiled
    before is forgotten: beyond so many variants torch would run it uncompiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = turned[0].device
    prefix, left, right, ahead = w.prefix, w.left, w.right, w.len_k - w.queries

    def span(b: Any, h: Any, i: Any, j: Any) -> Any:
        inside = j >= 0
        if left is not None:
            inside = inside & (j >= i + ahead - left)
        if right is not None:
            inside = inside & (j <= i + ahead + right)
        return inside | (j < prefix)

    blocks = None
    if not (left is None and right is None):
        blocks = create_block_mask(span, None, None, w.queries, w.len_k, device=device.type)
    function: Callable[..., Any] = flex_attention
    if device.type != "cpu":
        torch.compiler.reset()
        function = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    call = partial(function, *turned, block_mask=blocks, enable_gqa=w.heads != w.kv)
    return Peer(call, _turned_back)


def _flash(w: Workload, given: tuple[Tensor, ...], name: str) -> Peer:
    function = module(FLASH_ATTENTION[name]).flash_attn_func
    require(w.prefix == 0, "it has no prefix")
    window = (-1 if w.left is None else w.left, -1 if w.right is None else w.right)
    if name == "flash-attn 4":
        window = tuple(None if n < 0 else n for n in window)  # type: ignore[assignment]
    if w.left is None and w.right in (None, 0):
        call = partial(function, *given, causal=w.right == 0)
    else:
        call = partial(function, *given, causal=w.right == 0, window_size=window)
    return Peer(call, _first)


def _turned_back(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def _first(found: Any) -> Tensor:
    """out of a call that may return lse with it."""
    return found[0] if isinstance(found, tuple) else found
