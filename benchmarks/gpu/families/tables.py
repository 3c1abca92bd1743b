"""Forward and backward with a row of distances for each query and for each key, as DeBERTa has them: tables here, a tensor of
all pairs in the peers."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Bias, Check, all_of, gradients
from ..peers import dense as peers
from ..workload import Problem, Workload
from . import normal
from .backward import PRODUCTS
from .dense import tensors


def build(w: Workload, device: torch.device) -> Problem:
    radius = w.queries - 1
    leaves = [x.requires_grad_() for x in tensors(w, device)]
    dout = normal(*leaves[0].shape, device=device, dtype=w.dtype)
    shape = (w.batch, w.heads, w.queries, 2 * radius + 1)
    rows, columns = (normal(*shape, device=device, dtype=w.dtype).requires_grad_() for _ in range(2))
    j = torch.arange(w.queries, device=device)
    place = j - j[:, None] + radius

    def plane(by_row: Tensor, by_column: Tensor) -> Tensor:
        """(..., S, 2R + 1) each -> (..., S, S)"""
        index = place.expand(*by_row.shape[:-1], -1)
        return by_row.gather(-1, index) + by_column.gather(-1, index.mT).mT

    def ours(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            out = da.attention(*leaves, row_distance_bias=rows, col_distance_bias=columns, backend=backend)
            return torch.autograd.grad(out, [*leaves, rows, columns], dout)

        return step

    def check(found: tuple[Tensor, ...]) -> Check:
        h = w.heads - 1
        one_head = (x.detach()[:, :, h] for x in (*leaves, dout))
        both = torch.stack([x.detach()[:, h] for x in (rows, columns)])
        of_tables = Bias(both, lambda values: plane(*values), 1)
        of_both = torch.stack([x[:, h] for x in found[3:]])
        return gradients([*(x[:, :, h] for x in found[:3]), of_both], *one_head, all_of(w.queries), of_tables)

    flops = 2.0 * (PRODUCTS + 2) * w.batch * w.heads * w.head_dim * w.queries**2
    return Problem(
        ours, peers.with_whole_bias(leaves, [rows, columns], [lambda: plane(rows, columns)], dout), check, flops
    )
