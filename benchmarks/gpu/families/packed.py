"""Forward of sequences of many lengths: packed here, padded in SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import duplex_attn as da
import torch
from torch import Tensor

from ..check import Check, Sample, outputs, seen, spread
from ..peers import packed as peers
from ..workload import Problem, Workload
from . import lengths, normal


def build(w: Workload, device: torch.device) -> Problem:
    lens = lengths(w)
    cu = torch.nn.functional.pad(torch.tensor(lens).cumsum(0), (1, 0)).to(device, torch.int32)
    q, k, v = (normal(sum(lens), heads, w.head_dim, device=device, dtype=w.dtype) for heads in (w.heads, w.kv, w.kv))
    mask = da.Mask(w.prefix, w.left, w.right)
    starts = [sum(lens[:b]) for b in range(len(lens))]

    def ours(backend: str) -> Callable[[], Tensor]:
        return partial(da.varlen_attention, q, k, v, cu, cu, w.queries, w.queries, mask, backend=backend)

    def check(out: Tensor) -> Check:
        def samples():
            for b in {0, len(lens) - 1, lens.index(max(lens)), lens.index(min(lens))}:
                n, start, h = lens[b], starts[b], b % w.heads
                rows, keys = spread(n, device=device), slice(start, start + n)
                span = seen(rows, n, n, w.prefix, w.left, w.right)
                g = h // (w.heads // w.kv)
                yield out[start + rows, h], Sample(q[start + rows, h], k[keys, g], v[keys, g], span)

        return outputs(samples())

    pairs = sum(n * n for n in lens) * (0.5 if w.right == 0 else 1.0)
    moved = q.element_size() * (2 * q.numel() + k.numel() + v.numel())
    return Problem(ours, peers.forward(w, q, k, v, cu, lens), check, 4.0 * w.heads * w.head_dim * pairs, moved)
