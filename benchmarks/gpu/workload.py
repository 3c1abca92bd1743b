"""A workload and its bars as plain data; families/ turn one into tensors and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .check import Check

HEAD_DIM_CLASSES = (64, 128, 256)
TINY_ROWS, TINY_KEYS, TINY_WIDTH, TINY_SPAN = 20, 44, 64, 12


@dataclass(frozen=True)
class Bar:
    """What a backend is to reach: `value` times the speed of what it is held against, or at most so many seconds.

    against: a system's name; "best peer"; "padded best", of those whose names begin so; "copy", the card's copy bandwidth;
    "workload:NAME", this backend itself on another workload; for seconds "", or "kernel": over those of the kernel alone.
    """

    backend: str
    value: float
    against: str

    def __str__(self) -> str:
        if not self.against:
            return f"{self.backend} <= {self.value * 1e6:g} us"
        if self.against == "kernel":
            return f"{self.backend} <= the kernel + {self.value * 1e6:g} us"
        if self.against == "copy":
            return f"{self.backend} >= {self.value:.0%} of the copy bandwidth"
        return f"{self.backend} >= {self.value:g} x {self.against.removeprefix('workload:')}"


@dataclass(frozen=True)
class Workload:
    """Sizes of one call; what does not apply stays as it is."""

    name: str
    family: str  # a module of families/
    batch: int = 1
    heads: int = 16
    heads_kv: int = 0  # 0: heads
    queries: int = 1  # of a sequence; of the longest where there are lengths
    keys: int = 0  # 0: queries
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    prefix: int = 0
    left: int | None = None
    right: int | None = None
    distance_radius: int = 0
    pair_bias: bool = False  # a number for every (head, i, j), the batch sharing them, and their gradient
    alibi: bool = False
    shortest: int = 0  # lengths uniform from here to queries
    page_size: int = 0
    stored: torch.dtype | None = None  # of the pages
    parts: int = 1  # of the keys, whose outputs are merged
    pages: int = 0  # copied
    deterministic: bool = False  # gradients
    flex: bool = False  # FlexAttention runs it too: each takes many seconds to compile
    bars: tuple[Bar, ...] = field(default=(), compare=False)

    @property
    def len_k(self) -> int:
        return self.keys or self.queries

    @property
    def kv(self) -> int:
        return self.heads_kv or self.heads

    @property
    def terms(self) -> bool:
        """A score is more than <q, k>."""
        return self.distance_radius > 0 or self.pair_bias or self.alibi

    def tiny(self) -> Workload:
        """The same in little: for a rehearsal, where an interpreted tile takes milliseconds."""

        def span(n: int | None) -> int | None:
            return None if n is None else min(n, TINY_SPAN)

        return replace(
            self, batch=min(self.batch, 2), heads=2 * self.heads // self.kv, heads_kv=2, left=span(self.left),
            right=span(self.right), queries=min(self.queries, TINY_ROWS), keys=min(self.keys, TINY_KEYS),
            prefix=min(self.prefix, TINY_SPAN), shortest=min(self.shortest, 3), pages=min(self.pages, 1),
            head_dim=min(self.head_dim, TINY_WIDTH), distance_radius=min(self.distance_radius, TINY_SPAN),
        )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Another system on the same tensors: `call` is what is timed, `answer` its output as ours lies."""

    call: Callable[[], Any]
    answer: Callable[[Any], Any] = lambda found: found
    checked: bool = True  # not where it computes something else, like a copy


class Unavailable(Exception):
    """Why a system does not run this workload here."""


@dataclass(frozen=True)
class Problem:
    """A workload's tensors are behind these; a peer is made when its turn comes, and may be Unavailable."""

    ours: Callable[[str], Callable[[], Any]]  # of a backend's name
    peers: Mapping[str, Callable[[], Peer]]
    check: Callable[[Any], Check]  # of an answer
    flops: float = 0.0  # of one call
    moved: float = 0.0  # bytes that one call must read and write
    repeat: int = 1  # calls in one of `ours`
    as_chosen: bool = False  # a model, which leaves the choice of the backend to the package
    on_host: bool = False  # timed from Python until it returns, not until the card is done
    facts: Callable[[Callable[[], Any]], dict[str, Any]] = lambda call: {}  # more of a call that was measured
