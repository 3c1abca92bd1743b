"""A pool of pages in any order, with what its sequences hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..workload import Workload
from . import normal

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Pool:
    k_pages: Tensor  # (num_pages, page_size, heads_kv, head_dim)
    v_pages: Tensor
    block_table: Tensor  # int32 (B, pages of a sequence)
    seqlens_k: Tensor  # int32 (B,)
    scales: dict[str, Tensor]

    def keys_and_values(self, b: int, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What sequence b has of one kv head: (Sk, D) each, worth what the stored numbers are."""
        n, page_size = int(self.seqlens_k[b]), self.k_pages.shape[1]
        j = torch.arange(n, device=self.block_table.device)
        page, slot = self.block_table[b, j // page_size].long(), j % page_size

        def rows(pages: Tensor, scales: Tensor | None) -> Tensor:
            if scales is None:
                return pages[page, slot, head]
            stored = pages.view(torch.uint8)[page, slot, head].view(pages.dtype)  # torch may not index fp8 on a card
            return (stored.float() * scales[page, slot, head][:, None]).to(dtype)

        return rows(self.k_pages, self.scales.get("k_scales")), rows(self.v_pages, self.scales.get("v_scales"))


def pool(w: Workload, device: torch.device) -> Pool:
    """Every sequence has w.len_k keys."""
    each = -(-w.len_k // w.page_size)
    order = torch.randperm(w.batch * each, device=device)
    table = order.view(w.batch, each).int()
    shape = (w.batch * each, w.page_size, w.kv, w.head_dim)
    scales: dict[str, Tensor] = {}
    pages = []
    for name in ("k_scales", "v_scales"):
        if w.stored is None:
            pages.append(normal(*shape, device=device, dtype=w.dtype))
            continue
        values = torch.randn(shape, device=device)
        scales[name] = values.abs().amax(-1) / LARGEST[w.stored]
        values /= scales[name][..., None]
        pages.append((values.round() if w.stored == torch.int8 else values).to(w.stored))
    seqlens = torch.full((w.batch,), w.len_k, dtype=torch.int32, device=device)
    return Pool(pages[0], pages[1], table, seqlens, scales)
