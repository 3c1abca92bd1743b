"""Outputs over parts of the keys into one, as split keys and rings of cards have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, against
from ..peers import merge as peers
from ..workload import Problem, Workload
from . import normal


def build(w: Workload, device: torch.device) -> Problem:
    outs = [normal(w.batch, w.queries, w.heads, w.head_dim, device=device, dtype=w.dtype) for _ in range(w.parts)]
    lses = [3 * torch.randn(w.batch, w.heads, w.queries, device=device) for _ in range(w.parts)]

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: da.merge_attention(outs, lses, backend=backend)[0]

    def check(out: Tensor) -> Check:
        b = w.batch - 1
        sample = [out[b] for out in outs], [lse[b] for lse in lses]
        truth, plain = (peers.formula(*sample, dtype) for dtype in (torch.float64, w.dtype))
        return against(out[b], truth, plain, None)

    found = {"torch": partial(peers.in_torch, outs, lses), "flashinfer": partial(peers.flashinfer, outs, lses)}
    moved = sum(x.nbytes for x in (*outs, *lses)) + outs[0].nbytes + lses[0].nbytes
    return Problem(ours, found, check, moved=float(moved))
