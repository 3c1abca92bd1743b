"""What an engine asks of a model: `GPT`, `Seq2Seq` and `integrations.paged_model.PagedModel` are such."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache


@dataclass(frozen=True)
class Opening:
    """How the sequence of a prompt begins in the cache."""

    tokens: list[int]
    bidirectional_prefix: int
    max_length: int | None  # tokens of the sequence at most; None: as many as the cache has room for
    context: Sequence[int]  # tokens whose text the generated text goes on


class CacheShape(NamedTuple):
    """What a model's keys and values are like in every layer."""

    layers: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device


class LanguageModel(Protocol):
    can_be_invariant: bool  # whether steps take batch_invariant=True

    @property
    def vocab_size(self) -> int: ...

    @property
    def cache_shape(self) -> CacheShape: ...

    def most_pages(self, page_size: int) -> int | None:
        """Pages, of so many tokens, of a sequence in the cache at most; None: as many as there are."""

    def modules(self) -> Iterable[nn.Module]: ...

    def opening(self, prompt: Sequence[int], page_size: int, bidirectional_prefix: int = 0) -> Opening:
        """How the sequence of a prompt begins in pages of so many tokens. Raises ValueError, naming what is wrong."""

    def step(
        self,
        ids: Tensor,
        cache: PagedKVCache,
        batch: PagedBatch,
        rows: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Logits (n, vocab_size) after a step of several sequences over a paged cache, which `batch` describes.

        ids int64 (T,): the new tokens of all sequences, one after another, as `batch.positions` counts them.
        rows int64 (n,): which of them logits are wanted for; by default the last of each sequence.
        batch_invariant: a token's logits do not depend in any bit on the other sequences, nor on how its own was cut
            into steps; slower.
        """
