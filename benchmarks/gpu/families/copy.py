"""Pages copied within their pool, as forks have it before one of them writes."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check
from ..workload import Peer, Problem, Workload
from .pages import pool


def build(w: Workload, device: torch.device) -> Problem:
    made = pool(w, device)
    src, dst = made.block_table.flatten()[: 2 * w.pages].chunk(2)
    pools = (made.k_pages, made.v_pages)

    def ours(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        def step() -> tuple[Tensor, Tensor]:
            da.copy_pages(*pools, src, dst, backend=backend)
            return pools

        return step

    def by_index() -> Peer:
        def step() -> tuple[Tensor, Tensor]:
            for pages in pools:
                pages[dst] = pages[src]
            return pools

        return Peer(step)

    def check(pages: tuple[Tensor, Tensor]) -> Check:
        same = all(torch.equal(x[dst], x[src]) for x in pages)
        for x in pages:
            x[dst] = 0  # for the next system to fill
        return Check(0.0, 0.0, 0.0 if same else float("nan"))

    moved = 2.0 * w.pages * (pools[0][:1].nbytes + pools[1][:1].nbytes)
    return Problem(ours, {"torch, by index": by_index}, check, moved=moved)
