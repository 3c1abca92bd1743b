"""New tokens over the pages of their sequences: one each (decode) or a chunk (prefill)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, Sample, outputs, seen, spread
from ..peers import paged as peers
from ..workload import Problem, Workload
from . import normal
from .dense import sampled_heads, visible_pairs
from .pages import pool


def build(w: Workload, device: torch.device) -> Problem:
    made = pool(w, device)
    q = normal(w.batch * w.queries, w.heads, w.head_dim, device=device, dtype=w.dtype)
    chunk: dict[str, Any] = {}
    slopes = 2.0 ** -(8 * torch.arange(1, w.heads + 1, device=device) / w.heads) if w.alibi else None
    if w.queries > 1:
        cu = torch.arange(w.batch + 1, dtype=torch.int32, device=device) * w.queries
        chunk = {"cu_seqlens_q": cu, "max_seqlen_q": w.queries}

    def ours(backend: str) -> Callable[[], Tensor]:
        return partial(
            da.paged_attention, q, made.k_pages, made.v_pages, made.block_table, made.seqlens_k,
            da.Mask(w.prefix, w.left, w.right), **chunk, **made.scales, alibi_slopes=slopes, backend=backend,
        )  # fmt: skip

    def check(out: Tensor) -> Check:
        rows = spread(w.queries, device=device)
        span = seen(rows, w.queries, w.len_k, w.prefix, w.left, w.right)
        distance = (torch.arange(w.len_k, device=device) - rows[:, None] - (w.len_k - w.queries)).abs()

        def samples():
            for b, h, g in sampled_heads(w):
                k, v = made.keys_and_values(b, g, w.dtype)
                place = b * w.queries + rows
                bias = None if slopes is None else -slopes[h] * distance
                yield out[place, h], Sample(q[place, h], k, v, span, bias)

        return outputs(samples())

    moved = made.k_pages.nbytes + made.v_pages.nbytes + sum(x.nbytes for x in made.scales.values()) + 2 * q.nbytes
    flops = 4.0 * w.batch * w.heads * w.head_dim * visible_pairs(w)
    return Problem(ours, peers.attention(w, q, made, slopes), check, flops, moved)
