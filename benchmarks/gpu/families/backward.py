"""Backward alone, of a dense batch: the graph of one forward is kept and gone through again."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, gradients, seen
from ..peers import dense as peers
from ..workload import Problem, Workload
from . import normal
from .dense import tensors, visible_pairs

PRODUCTS = 5  # of matrices; forward has 2


def build(w: Workload, device: torch.device) -> Problem:
    leaves = [x.requires_grad_() for x in tensors(w, device)]
    dout = normal(*leaves[0].shape, device=device, dtype=w.dtype)
    mask = da.Mask(w.prefix, w.left, w.right)

    def ours(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        out = da.attention(*leaves, mask, deterministic=w.deterministic, backend=backend)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def check(found: tuple[Tensor, ...]) -> Check:
        b, h = w.batch - 1, w.heads - 1

        def span(rows: Tensor) -> Tensor:
            return seen(rows, w.queries, w.len_k, w.prefix, w.left, w.right)

        return gradients(
            [x[b, :, h] for x in found], *(x.detach()[b, :, h] for x in leaves), dout[b, :, h], span
        )  # heads are not shared in these workloads

    flops = 2.0 * PRODUCTS * w.batch * w.heads * w.head_dim * visible_pairs(w)
    moved = dout.element_size() * (2 * dout.numel() + 2 * sum(x.numel() for x in leaves))
    return Problem(ours, peers.backward(w, leaves, dout), check, flops, moved)
