"""Forward and backward with T5's bias by distance: a table here, a tensor of all pairs in the peers."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, gradients
from ..peers import dense as peers
from ..workload import Problem, Workload
from . import normal
from .backward import PRODUCTS
from .dense import tensors


def build(w: Workload, device: torch.device) -> Problem:
    leaves = [x.requires_grad_() for x in tensors(w, device)]
    table = torch.randn(w.heads, 2 * w.distance_radius + 1, device=device).requires_grad_()
    dout = normal(*leaves[0].shape, device=device, dtype=w.dtype)
    j = torch.arange(w.queries, device=device)
    place = (j - j[:, None]).clamp(-w.distance_radius, w.distance_radius) + w.distance_radius

    def ours(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            out = da.attention(*leaves, distance_bias=table, backend=backend)
            return torch.autograd.grad(out, [*leaves, table], dout)

        return step

    def check(found: tuple[Tensor, ...]) -> Check:
        b, h = w.batch - 1, w.heads - 1
        everything = torch.ones(w.queries, w.queries, dtype=torch.bool, device=device)
        one_head = [x[b, :, h] for x in found[:3]]
        return gradients(
            one_head, *(x.detach()[b, :, h] for x in leaves), dout[b, :, h], everything, table.detach()[h][place]
        )

    flops = 2.0 * (PRODUCTS + 2) * w.batch * w.heads * w.head_dim * w.queries**2
    return Problem(ours, peers.biased(w, leaves, table, place, dout), check, flops)
