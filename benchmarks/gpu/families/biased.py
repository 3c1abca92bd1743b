"""Forward and backward with a bias that is learned: T5's by distance, a table here and a tensor of all pairs in the peers;
or one of pairs, a tensor for all, as AlphaFold's triangle attention has it."""

from __future__ import annotations

from collections.abc import Callable

import duplex_attn as da
import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import Bias, Check, all_of, gradients
from ..peers import dense as peers
from ..workload import Problem, Workload
from . import normal
from .backward import PRODUCTS
from .dense import tensors


def build(w: Workload, device: torch.device) -> Problem:
    leaves = [x.requires_grad_() for x in tensors(w, device)]
    dout = normal(*leaves[0].shape, device=device, dtype=w.dtype)
    if w.pair_bias:
        bias = normal(w.heads, w.queries, w.queries, device=device, dtype=w.dtype).requires_grad_()
        rows = w.batch
    else:
        bias = torch.randn(w.heads, 2 * w.distance_radius + 1, device=device).requires_grad_()
        rows = w.batch * w.queries
        j = torch.arange(w.queries, device=device)
        place = (j - j[:, None]).clamp(-w.distance_radius, w.distance_radius) + w.distance_radius

    def plane(values: Tensor) -> Tensor:
        """(..., Sq, Sk)"""
        return values if w.pair_bias else values[..., place]

    def embedded(values: Tensor) -> Tensor:
        """The same, as T5 has it."""
        return F.embedding(place, values.mT).permute(2, 0, 1).contiguous()

    planes = [plane] if w.pair_bias else [plane, embedded]

    def ours(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            given = {"bias": bias} if w.pair_bias else {"distance_bias": bias}
            out = da.attention(*leaves, **given, backend=backend)
            return torch.autograd.grad(out, [*leaves, bias], dout)

        return step

    def check(found: tuple[Tensor, ...]) -> Check:
        h = w.heads - 1
        one_head = (x.detach()[:, :, h] for x in (*leaves, dout))
        of_bias = Bias(bias.detach()[h], plane, rows)
        return gradients([*(x[:, :, h] for x in found[:3]), found[3][h]], *one_head, all_of(w.queries), of_bias)

    flops = 2.0 * (PRODUCTS + 2) * w.batch * w.heads * w.head_dim * w.queries**2
    return Problem(ours, peers.biased(w, leaves, bias, planes, dout), check, flops)
