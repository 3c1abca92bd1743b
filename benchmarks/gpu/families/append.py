"""New keys and values into their pages, keys turned by their positions on the way; beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, against
from ..workload import Peer, Problem, Workload
from . import normal
from .pages import pool


def build(w: Workload, device: torch.device) -> Problem:
    made = pool(w, device)
    total = w.batch * w.queries
    k, v = (normal(total, w.kv, w.head_dim, device=device, dtype=w.dtype) for _ in range(2))
    cu = torch.arange(w.batch + 1, dtype=torch.int32, device=device) * w.queries
    positions = torch.arange(w.queries, dtype=torch.int32, device=device).repeat(w.batch)
    half = torch.arange(0, w.head_dim, 2, device=device) / w.head_dim
    angles = torch.arange(w.queries, device=device)[:, None] * 10000.0**-half
    cos, sin = angles.cos(), angles.sin()
    place = (k, v, made.k_pages, made.v_pages, made.block_table, positions, cu)

    def ours(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        def step() -> tuple[Tensor, Tensor]:
            da.paged_append(*place, rope_cos=cos, rope_sin=sin, backend=backend)
            return made.k_pages, made.v_pages

        return step

    def check(pages: tuple[Tensor, Tensor]) -> Check:
        found = [_stored(x, made.block_table, positions, w) for x in pages]
        if not torch.equal(found[1], v):
            return Check(float("nan"), 0.0, float("nan"))
        truth, plain = (_turned(k.to(t), cos.to(t), sin.to(t), positions) for t in (torch.float64, torch.float32))
        return against(found[0], truth, plain.to(k.dtype), None)

    copies = [torch.empty_like(x) for x in (k, v)]

    def copy() -> Peer:
        return Peer(lambda: [target.copy_(x) for target, x in zip(copies, (k, v), strict=True)], checked=False)

    return Problem(ours, {"copy of the bytes": copy}, check, moved=2.0 * (k.nbytes + v.nbytes))


def _stored(pages: Tensor, table: Tensor, positions: Tensor, w: Workload) -> Tensor:
    sequence = torch.arange(len(positions), device=pages.device) // w.queries
    page = table[sequence, positions.long() // w.page_size].long()
    return pages[page, positions.long() % w.page_size]


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    c, s = (t[positions.long()][:, None] for t in (cos, sin))
    return torch.cat((a * c - b * s, b * c + a * s), -1)
