"""Sequences cut into chunks: which rank holds which, and what the queries of one see of the keys of another.

Numbers alone, the same on every rank; distributed.py moves and computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


def chunks_of(rank: int, world: int, chunks: int) -> tuple[int, ...]:
    """Of world * chunks; two are one from either end, which together see as much of a causal mask on every rank."""
    return (rank,) if chunks == 1 else (rank, 2 * world - 1 - rank)


class Part(NamedTuple):
    """A chunk of queries and one of keys, each in rows of its own: i sees j < prefix or i - left <= j <= i + right."""

    chunk: int  # among the rank's
    rows: slice  # of the rank's queries
    keys: slice  # of those at hand
    first_key: int  # in the whole sequence
    shift: int  # position of the first query, counted from the first key
    prefix: int | None  # None: a tensor's, which is not read
    left: int | None
    right: int | None


class Division(NamedTuple):
    """How sequences are divided among ranks, and the mask of the whole."""

    world: int
    chunks: int  # of a rank
    rows: int  # queries of a chunk
    keys: int  # of a chunk
    first_position: int  # of query 0
    prefix: int | None  # None: a tensor, which is not read
    left: int | None
    right: int | None

    def parts(self, rank: int, step: int) -> Iterator[Part]:
        """What the queries of a rank see of the keys of the rank `step` before it; what is hidden wholly is left out."""
        queries, keys = (chunks_of(n % self.world, self.world, self.chunks) for n in (rank, rank - step))
        for (n, a), (m, b) in product(enumerate(queries), enumerate(keys)):
            first_key = b * self.keys
            shift = a * self.rows + self.first_position - first_key
            left = self.rows if self.left is None else max(self.left - shift, -self.keys)
            right = self.keys if self.right is None else max(self.right + shift, -self.rows)
            prefix = None if self.prefix is None else min(max(self.prefix - first_key, 0), self.keys)
            if prefix == self.keys:
                prefix, left, right = 0, self.rows, self.keys
            in_window = left > -self.keys and right > -self.rows and left + right >= 0
            if self.rows and self.keys and (in_window or prefix != 0):
                rows, columns = slice(n * self.rows, (n + 1) * self.rows), slice(m * self.keys, (m + 1) * self.keys)
                bounds = left if left < self.rows - 1 else None, right if right < self.keys - 1 else None
                yield Part(n, rows, columns, first_key, shift, prefix, *bounds)


@lru_cache(1024)
def steps(division: Division) -> tuple[int, ...]:
    """How far keys are carried, one after the other: not at all, then to wherever some rank sees something of them."""
    ranks = range(division.world)
    return (0, *(step for step in ranks[1:] if any(True for rank in ranks for _ in division.parts(rank, step))))


def by_distance(shift: int, reach: int, distance_bias: Tensor | None, slopes: Tensor | None) -> Tensor | None:
    """A part's biases, distance_bias and ALiBi's, as one table by its own distances j - i, (Hq, 2 * reach + 1)."""
    like = slopes if distance_bias is None else distance_bias
    if like is None:
        return None
    distance = torch.arange(-reach, reach + 1, device=like.device) - shift
    bias = like.new_zeros(len(like), 1)
    if distance_bias is not None:
        radius = distance_bias.shape[1] // 2
        bias = distance_bias[:, distance.clamp(-radius, radius) + radius]
    return bias if slopes is None else bias - slopes[:, None] * distance.abs()


def add_by_distance(total: Tensor, part: Tensor, shift: int) -> None:
    """The way back: adds the gradient of a part's table to that of distance_bias, whose ends take all beyond them."""
    size, first = part.shape[1], part.shape[1] // 2 + shift - total.shape[1] // 2  # where the part has total[:, 0]
    low, high = (min(max(n, 0), size) for n in (first + 1, first + total.shape[1] - 1))
    high = max(low, high)
    total[:, 0] += part[:, :low].sum(1)
    total[:, low - first : high - first] += part[:, low:high]
    total[:, -1] += part[:, high:].sum(1)
