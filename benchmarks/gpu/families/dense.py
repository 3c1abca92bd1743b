"""Forward of a dense batch under any span."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, Sample, outputs, seen, spread
from ..peers import dense as peers
from ..workload import Problem, Workload
from . import normal

HEADS = 3  # checked, spread over batch and heads


def build(w: Workload, device: torch.device) -> Problem:
    q, k, v = tensors(w, device)
    mask = da.Mask(w.prefix, w.left, w.right)

    def ours(backend: str) -> Callable[[], Tensor]:
        return partial(da.attention, q, k, v, mask, backend=backend)

    def check(out: Tensor) -> Check:
        rows = spread(w.queries, device=device)
        span = seen(rows, w.queries, w.len_k, w.prefix, w.left, w.right)
        return outputs(
            (out[b, rows, h], Sample(q[b, rows, h], k[b, :, g], v[b, :, g], span)) for b, h, g in sampled_heads(w)
        )

    shown = visible_pairs(w)
    moved = q.element_size() * (2 * q.numel() + k.numel() + v.numel())
    return Problem(ours, peers.forward(w, q, k, v), check, 4.0 * w.batch * w.heads * w.head_dim * shown, moved)


def tensors(w: Workload, device: torch.device) -> list[Tensor]:
    """q, k, v: (B, S, H, D)."""
    shapes = ((w.queries, w.heads), (w.len_k, w.kv), (w.len_k, w.kv))
    return [normal(w.batch, rows, heads, w.head_dim, device=device, dtype=w.dtype) for rows, heads in shapes]


def sampled_heads(w: Workload) -> list[tuple[int, int, int]]:
    """Batch, head and kv head of a few."""
    picked = spread(w.batch * w.heads, HEADS).tolist()
    return [(n // w.heads, n % w.heads, n % w.heads // (w.heads // w.kv)) for n in picked]


def visible_pairs(w: Workload) -> int:
    """(i, j) that a head sees, by counting each row's span."""
    p = torch.arange(w.queries) + w.len_k - w.queries
    first = torch.zeros_like(p) if w.left is None else (p - w.left).clamp(0)
    last = torch.full_like(p, w.len_k - 1) if w.right is None else (p + w.right).clamp(max=w.len_k - 1)
    window = (last - first.clamp(min=w.prefix) + 1).clamp(0)
    return int((window + min(w.prefix, w.len_k)).sum())
