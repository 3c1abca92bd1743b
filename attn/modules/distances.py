"""Biases by distance as T5 has them: near distances have a bucket each, far ones share it, on a logarithmic scale
(Raffel et al. 2020, arXiv 1910.10683)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class DistanceBias(nn.Module):
    """A learned bias for each head and bucket of distances, as the table that attention takes for its `distance_bias`."""

    def __init__(self, heads: int, buckets: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(buckets, heads))

    def forward(self, bucket: Tensor) -> Tensor:
        """(heads, 2 R + 1), of the buckets of distances -R to R."""
        return self.weight.index_select(0, bucket).mT.contiguous()


def all_buckets(buckets: int, max_distance: int, both_ways: bool, device: torch.device) -> Tensor:
    """int64 (2 R + 1,): the buckets of distances -R to R; further than R all of a side have one."""
    reach = max(max_distance, buckets)
    return bucket_of(torch.arange(-reach, reach + 1, device=device), buckets, max_distance, both_ways)


def bucket_of(distance: Tensor, buckets: int, max_distance: int, both_ways: bool) -> Tensor:
    """int64: the bucket of each distance of a key from its query, j - i.

    both_ways: keys behind the query have the second half of the buckets; else all of them that of distance 0.
    """
    first = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = -distance.abs()
    steps = (-distance).clamp(min=0)
    exact = buckets // 2
    growth = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # from `exact` on, 0 to 1
    shared = exact + (growth * (buckets - exact)).long()
    return first + torch.where(steps < exact, steps, shared.clamp(max=buckets - 1))
