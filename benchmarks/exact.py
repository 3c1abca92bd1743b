"""Dense answers against float64, by the accuracy contract, before anything is timed."""

from __future__ import annotations

import torch
from duplex_attn import Mask
from torch import Tensor

from .gpu.check import Check, Sample, outputs, seen

SAMPLES = 4  # heads that are checked, spread over batch and heads: float64 scores are large


def visible(mask: Mask, queries: int, keys: int, sequence: int, device: torch.device) -> Tensor:
    """bool (queries, keys)."""
    prefix = int(mask.prefix[sequence]) if isinstance(mask.prefix, Tensor) else mask.prefix
    return seen(torch.arange(queries, device=device), queries, keys, prefix, mask.left, mask.right)


def verify(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Check:
    """out (B, Sq, Hq, Dv) of q (B, Sq, Hq, D), k and v (B, Sk, Hk, D): raises AssertionError where it is wrong."""
    batch, queries, heads = q.shape[:3]
    group = heads // k.shape[2]
    pairs = []
    for sample in range(min(SAMPLES, batch * heads)):
        b, h = divmod(sample * (batch * heads - 1) // max(SAMPLES - 1, 1), heads)
        one = Sample(
            q[b, :, h], k[b, :, h // group], v[b, :, h // group], visible(mask, queries, k.shape[1], b, q.device)
        )
        pairs.append((out[b, :, h], one))
    check = outputs(pairs)
    assert check.passes(ours=True), str(check)
    return check
