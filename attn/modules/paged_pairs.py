"""Pairs of source and target in a paged cache: where the tokens of a step lie, for a decoder that reads an encoder.

A sequence of the cache is such a pair. Its first pages hold the decoder's keys of the source, which is its bidirectional
prefix, and those from the next page on the keys of the target: each half is a sequence with a block table of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import contents_are_readable, wrong_value
from ..functional import varlen_attention
from ..mask import Mask, causal, full
from ..paged.functional import paged_append, paged_attention
from .paged_rows import in_blocks

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache
    from .seq2seq import Seq2SeqLayer

_CAUSAL, _FULL = causal(), full()


@dataclass(frozen=True)
class Half:
    """Of each pair its source, or its target."""

    index: Tensor  # int64 (T,): which of the step's tokens are new here
    positions: Tensor  # int32 (T,)
    cu_seqlens: Tensor  # int32 (B + 1,)
    block_table: Tensor  # int32 (B, pages)
    seqlens: Tensor  # int32 (B,), the new tokens included
    longest: int  # of them
    new: list[int]  # tokens of each pair

    @classmethod
    def of(cls, new: Tensor, positions: Tensor, pair: Tensor, block_table: Tensor, seqlens: Tensor) -> Half:
        """new bool (T,): the tokens of this half among the step's, whose positions in it and pairs are given."""
        index = new.nonzero().squeeze(1)
        counts = torch.bincount(pair[index], minlength=len(seqlens))
        cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        longest = max(seqlens.tolist(), default=0)
        return cls(index, positions[index], cu_seqlens, block_table, seqlens, longest, counts.tolist())

    @property
    def max_new(self) -> int:
        return max(self.new, default=0)

    def to(self, device: torch.device) -> Half:
        index, positions, cu_seqlens, block_table, seqlens = (
            x.to(device, non_blocking=True)
            for x in (self.index, self.positions, self.cu_seqlens, self.block_table, self.seqlens)
        )
        return Half(index, positions, cu_seqlens, block_table, seqlens, self.longest, self.new)


def halves(batch: PagedBatch) -> tuple[Half, Half]:
    """Sources and targets of a batch, on the CPU."""
    block_table, seqlens, cu_seqlens, positions = batch.on_host
    sources = torch.tensor([seq.bidirectional_prefix for seq in batch.seqs], dtype=torch.int32)
    pages = (sources + batch.page_size - 1) // batch.page_size
    begins = pages * batch.page_size
    pair = torch.repeat_interleave(cu_seqlens.diff())
    targets = (seqlens - begins).clamp(min=0)
    width = -(-max(targets.tolist(), default=0) // batch.page_size)
    places = pages[:, None].long() + torch.arange(width)
    table = block_table.gather(1, places.clamp(max=block_table.shape[1] - 1))  # past a target's own pages any will do
    in_target = positions - begins[pair]
    source = Half.of(positions < sources[pair], positions, pair, block_table, torch.minimum(seqlens, sources))
    return source, Half.of(in_target >= 0, in_target, pair, table, targets)


@dataclass(frozen=True)
class NewSources:
    """Where the tokens of new sources lie for an encoder, which has each of them whole."""

    half: Half
    batch_invariant: bool

    def apply(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        return in_blocks(f, *xs) if self.batch_invariant else f(*xs)

    def attend(self, layer: Seq2SeqLayer, q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None) -> Tensor:
        cu, longest = self.half.cu_seqlens, self.half.max_new
        terms: dict[str, Any] = {"distance_bias": distance_bias, "scale": layer.scores.scale}
        return varlen_attention(q, k, v, cu, cu, longest, longest, _FULL, batch_invariant=self.batch_invariant, **terms)

    def attend_source(self, layer: Seq2SeqLayer, q: Tensor) -> Tensor:
        raise RuntimeError("attend_source: expected a decoder's layer, got one of an encoder")


@dataclass(frozen=True)
class PagedPairs:
    """Where the new tokens of targets lie for a decoder, and the keys of their sources."""

    cache: PagedKVCache
    source: Half
    target: Half
    source_plan: Tensor | None
    target_plan: Tensor | None
    batch_invariant: bool

    @classmethod
    def of(cls, cache: PagedKVCache, batch: PagedBatch, batch_invariant: bool) -> PagedPairs:
        if batch.in_fixed_buffers:
            wrong_value("batch", "one with tensors of its own", "one in fixed buffers")
        if not all(seq.bidirectional_prefix for seq in batch.seqs):
            wrong_value("batch", "sequences with a source, their bidirectional prefix", "one without")
        source, target = halves(batch)

        def plan(keys: Half, mask: Mask) -> Tensor | None:
            return batch.plan_over(keys.block_table, keys.seqlens, target.cu_seqlens, mask, batch_invariant)

        device = batch.positions.device
        plans = plan(source, _FULL), plan(target, _CAUSAL)
        return cls(cache, source.to(device), target.to(device), *plans, batch_invariant)

    @property
    def new_sources(self) -> NewSources:
        return NewSources(self.source, self.batch_invariant)

    def apply(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        return self.new_sources.apply(f, *xs)

    def append_source(self, layer: Seq2SeqLayer, k: Tensor, v: Tensor) -> None:
        """Stores a layer's keys and values of the new sources (T, H, D)."""
        self._append(layer, k, v, self.source)

    def attend(self, layer: Seq2SeqLayer, q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None) -> Tensor:
        self._append(layer, k, v, self.target)
        return self._attend(layer, q, self.target, _CAUSAL, self.target_plan, distance_bias)

    def attend_source(self, layer: Seq2SeqLayer, q: Tensor) -> Tensor:
        return self._attend(layer, q, self.source, _FULL, self.source_plan, None)

    def rows_of(self, rows: Tensor | None) -> Tensor:
        """int64: which tokens of targets those `rows` of the step are; of None, the last ones of all targets."""
        if rows is None:
            if not all(self.target.new):
                wrong_value("rows", "the rows wanted, where a target has no new token", None)
            return self.target.cu_seqlens[1:].long() - 1
        index = self.target.index
        found = torch.searchsorted(index, rows)
        if contents_are_readable(rows) and not torch.isin(rows, index).all():
            wrong_value("rows", "tokens of targets", rows.tolist())
        return found

    def _append(self, layer: Seq2SeqLayer, k: Tensor, v: Tensor, half: Half) -> None:
        pages, scales = self._layer(layer)
        paged_append(k, v, *pages, half.block_table, half.positions, half.cu_seqlens, **scales)

    def _attend(
        self, layer: Seq2SeqLayer, q: Tensor, keys: Half, mask: Mask, plan: Tensor | None, distance_bias: Tensor | None
    ) -> Tensor:
        pages, scales = self._layer(layer)
        return paged_attention(
            q,
            *pages,
            keys.block_table,
            keys.seqlens,
            mask,
            cu_seqlens_q=self.target.cu_seqlens,
            max_seqlen_q=self.target.max_new,
            distance_bias=distance_bias,
            scale=layer.scores.scale,
            plan=plan,
            batch_invariant=self.batch_invariant,
            **scales,
        )

    def _layer(self, layer: Seq2SeqLayer) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Pages and scales of a layer."""
        pages = self.cache.k_pages[layer.index], self.cache.v_pages[layer.index]
        return pages, dict(zip(("k_scales", "v_scales"), self.cache.scales(layer.index), strict=True))
