"""Where the tokens of a step over a paged cache lie: what `Rows` is for whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import wrong_value
from ..mask import Mask, causal, prefix_lm
from ..paged.functional import paged_append, paged_attention
from .rope import Rope
from .rows import Scores

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache

BLOCK_ROWS = 16  # of every linear layer in the batch-invariant mode


@dataclass(frozen=True)
class PagedRows:
    """New tokens of several sequences, packed to (T, ...), whose keys and values go into a `PagedKVCache`.

    The mask is causal, with the bidirectional prefix that each
    sequence came with. batch_invariant: no bit of a row depends on what other rows there are.
    """

    cache: PagedKVCache
    batch: PagedBatch
    mask: Mask
    cu_seqlens: Tensor | None  # None where each sequence has one new token
    batch_invariant: bool

    @classmethod
    def of(cls, cache: PagedKVCache, batch: PagedBatch, batch_invariant: bool) -> PagedRows:
        prefixes = [seq.bidirectional_prefix for seq in batch.seqs]
        prefixes += [0] * (len(batch.seqlens_k) - len(prefixes))  # of buffers that are larger
        mask = causal()
        if any(prefixes):
            mask = prefix_lm(torch.tensor(prefixes, dtype=torch.int32, device=batch.seqlens_k.device))
        cu_seqlens = None if batch.decodes else batch.cu_seqlens_q
        return cls(cache, batch, mask, cu_seqlens, batch_invariant)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores,
        rope: Rope | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Stores k, v (T, Hk, D) and attends with q (T, Hq, D) to all that each sequence has. Rotates q and k by rope, that of
        all positions."""
        cache, batch, mask = self.cache, self.batch, scores.mask(self.mask)
        pages = (cache.k_pages[layer], cache.v_pages[layer])
        held: dict[str, Any] = dict(zip(("k_scales", "v_scales"), cache.scales(layer), strict=True))
        if rope is not None:
            held |= {"rope_cos": rope.cos, "rope_sin": rope.sin, "rope_interleaved": rope.interleaved}
        paged_append(k, v, *pages, batch.block_table, batch.positions, self.cu_seqlens, **held)
        return paged_attention(
            q,
            *pages,
            batch.block_table,
            batch.seqlens_k,
            mask,
            cu_seqlens_q=self.cu_seqlens,
            max_seqlen_q=batch.max_seqlen_q,
            scale=scores.scale,
            softcap=scores.softcap,
            sink=sink,
            plan=batch.plan(mask, self.batch_invariant),
            batch_invariant=self.batch_invariant,
            **held,
        )

    def apply(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """f of rows (T, ...), row by row the same."""
        return in_blocks(f, *xs) if self.batch_invariant else f(*xs)


def rows_wanted(ids: Tensor, batch: PagedBatch, rows: Tensor | None) -> Tensor:
    """The rows whose logits a step is asked for, by default the last of each sequence. Raises ValueError where there is none, or
    ids are not the batch's tokens."""
    if ids.shape != batch.positions.shape:
        wrong_value("ids", f"the batch's {len(batch.positions)} new tokens", tuple(ids.shape))
    if rows is not None:
        return rows
    if not all(batch.new_tokens):
        wrong_value("rows", "the rows wanted, where a sequence has no new token", None)
    return (batch.cu_seqlens_q[1:] - 1).clamp(min=0)  # buffers that hold no batch have rows too


def in_blocks(f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """f of rows (T, ...), row by row the same, over blocks of BLOCK_ROWS, the last one padded: a library's matmul gives other
    bits for one row than for two."""
    blocks = []
    for start in range(0, len(xs[0]), BLOCK_ROWS):
        parts = [x[start : start + BLOCK_ROWS] for x in xs]
        rows = len(parts[0])
        blocks.append(f(*(F.pad(part, (0, 0, 0, BLOCK_ROWS - rows)) for part in parts))[:rows])
    return torch.cat(blocks) if blocks else f(*xs)
