"""DeBERTa's attention (He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", 2021, arXiv 2006.03654).

A score has, beside <q_i, k_j>, a product of the query with an embedding of the distance and one of the key with another. Both
are tables that a matrix product makes, row_distance_bias and col_distance_bias: nothing of the size queries x keys is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional
from ..mask import Mask
from .rows import Rows, Scores, hidden

LIMIT = {"cpu": 2**26, "cuda": 2**28}  # bytes of tables at a time: on a CPU about what its caches hold


@dataclass(frozen=True)
class Disentangled:
    """Which products scores have, and how distances are told apart."""

    span: int = 512  # distances of either side that have an embedding of their own
    buckets: int = 256  # of either side, near ones exact and far ones on a logarithmic scale; 0: none
    content_to_position: bool = True  # of queries with embeddings
    position_to_content: bool = True  # of keys with embeddings
    shared: bool = True  # the layer's own projections make queries and keys of embeddings
    normalised: bool = True  # embeddings pass a norm

    @property
    def embeddings(self) -> int:
        """Of either side."""
        return self.buckets or self.span

    @property
    def products(self) -> int:
        """Of which a score is the sum."""
        return 1 + self.content_to_position + self.position_to_content

    def entries(self, length: int, device: torch.device) -> Tensor:
        """int64: which embedding each distance of a table has, for sequences of so many tokens."""
        steps = behind(length, self.span, device)
        if self.buckets:
            steps = log_bucket(steps, self.buckets, self.span)
        return clamped(steps, self.embeddings)


def behind(length: int, reach: int, device: torch.device) -> Tensor:
    """p(i) - j for each entry of a table by distance: from `reach` down, further than any key of the sequence is not needed."""
    reach = min(length - 1, reach)
    return torch.arange(reach, -reach - 1, -1, device=device)


def clamped(steps: Tensor, span: int) -> Tensor:
    return (steps + span).clamp(0, 2 * span - 1)


def log_bucket(steps: Tensor, buckets: int, span: int) -> Tensor:
    """int64: signed buckets of signed distances. Those up to half of the buckets are themselves, `span` is in the last one."""
    exact = buckets // 2
    far = steps.abs().clamp(min=exact)
    # In the order of operations that the published models were trained with: a bucket's edge is a matter of rounding.
    growth = torch.log(far / exact) / torch.log(torch.tensor((span - 1) / exact))
    bucket = (torch.ceil(growth * (exact - 1)) + exact).long()
    return torch.where(steps.abs() <= exact, steps, bucket * steps.sign())


class Padding(NamedTuple):
    """Which of (batch, seqlen) are tokens; what is None hides nothing."""

    lengths: Tensor | None = None  # int32 (batch,), tokens come first
    longest: tuple[int, ...] | None = None  # the same on the host
    keys: Tensor | None = None  # bool (batch, 1, 1, seqlen), where they come anywhere, or were not read

    def part(self, sequences: slice) -> Padding:
        parts: Any = [None if x is None else x[sequences] for x in self]
        return Padding(*parts)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    queries: Tensor | None,
    padding: Padding,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """q, k, v and the result (batch, seqlen, heads, dim); keys, queries (distances, heads, dim), of distances and scaled.

    The tables are made for so many sequences at a time that they take LIMIT bytes, and made again on the way back.
    """

    def some(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, queries: Tensor | None, part: Padding) -> Tensor:
        return functional.attention(
            q, k, v, Mask(align="top_left"), seqlens_q=part.lengths, seqlens_k=part.lengths, bias=part.keys,
            row_distance_bias=None if keys is None else products(q, keys),
            col_distance_bias=None if queries is None else products(k, queries),
            scale=scale, dropout_p=dropout_p,
        )  # fmt: skip

    batch, length, heads, _ = q.shape
    tables = [x for x in (keys, queries) if x is not None]
    each = sum(map(len, tables)) * heads * length * q.element_size()
    step = max(1, LIMIT.get(q.device.type, LIMIT["cuda"]) // max(1, each)) if tables else max(1, batch)
    recompute = partial(checkpoint, some, use_reentrant=False, preserve_rng_state=dropout_p > 0)
    call = recompute if tables and torch.is_grad_enabled() else some
    outs = []
    for first in range(0, batch, step):
        at = slice(first, first + step)
        part = padding.part(at)
        rows = length if part.longest is None else max(1, *part.longest)
        given: tuple[Any, ...] = (
            *(x[at, :rows] for x in (q, k, v)),
            nearest(keys, rows),
            nearest(queries, rows),
            part,
        )
        out = call(*given)
        outs.append(out if rows == length else F.pad(out, (0, 0, 0, 0, 0, length - rows)))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def nearest(positions: Tensor | None, rows: int) -> Tensor | None:
    """Of (distances, heads, dim), those that sequences of `rows` have."""
    if positions is None:
        return None
    middle = len(positions) // 2
    return positions[max(0, middle - rows + 1) : middle + rows]


def products(x: Tensor, positions: Tensor) -> Tensor:
    """x (batch, seqlen, heads, dim), positions (distances, heads, dim) -> (batch, heads, seqlen, distances)."""
    by_head = torch.bmm(x.flatten(0, 1).transpose(0, 1), positions.permute(1, 2, 0))
    return by_head.unflatten(1, x.shape[:2]).transpose(0, 1)


class DistanceEmbedding(nn.Module):
    """An embedding of each distance, which all layers share."""

    def __init__(self, options: Disentangled, width: int, eps: float):
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(2 * options.embeddings, width)
        self.norm = nn.LayerNorm(width, eps) if options.normalised else nn.Identity()

    def forward(self, rows: Rows) -> Distances:
        return Distances.of(rows, self.options, self.norm(self.embedding.weight))


@dataclass(frozen=True)
class Distances:
    """What the layers of a pass share: embeddings, and where tokens lie in rows that are padded on the right."""

    embeddings: Tensor  # (2 * embeddings, C)
    entries: Tensor  # int64 (distances,)
    scale: float  # of a product, but for 1 / sqrt(D)
    longest: int
    padding: Padding
    place: Tensor | None  # int64 (total,), in (batch * longest,), of packed tokens

    @classmethod
    def of(cls, rows: Rows, options: Disentangled, embeddings: Tensor) -> Distances:
        longest, padding, place = rows.seqlen, Padding(), None
        if rows.index is not None and rows.seqlens_q is not None:
            lengths = tuple(rows.seqlens_q.tolist())
            longest = max(lengths, default=0)
            padding = Padding(rows.seqlens_q, lengths)
            place = rows.index // max(rows.seqlen, 1) * longest + rows.counted()
        entries = options.entries(max(longest, 1), embeddings.device)
        return cls(embeddings, entries, options.products**-0.5, longest, padding, place)

    def attend(
        self, rows: Rows, q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, queries: Tensor | None, dropout_p: float
    ) -> Tensor:
        """q, k, v (total, H, D) or (B, S, H, D) -> out, shaped as q. keys, queries (2 * embeddings, H, D)."""
        scale = q.shape[-1] ** -0.5 * self.scale
        keys, queries = (None if x is None else x[self.entries] * scale for x in (keys, queries))
        if rows.attention != "duplex":
            seen = rows.visible(rows.mask)
            bias = hidden(bias_of_pairs(q, k, keys, queries), seen) if keys is not None or queries is not None else seen
            return rows.by_peer(q, k, v, bias, Scores(scale=scale), dropout_p)
        if self.place is None:
            return attend(q, k, v, keys, queries, self.padding, scale, dropout_p)
        if not self.longest:
            return v  # no token has anything to see
        padded = torch.stack((q, k, v), 1)
        whole = padded.new_zeros(rows.batch * self.longest, *padded.shape[1:]).index_copy(0, self.place, padded)
        q, k, v = whole.unflatten(0, (rows.batch, self.longest)).unbind(2)
        out = attend(q, k, v, keys, queries, self.padding, scale, dropout_p)
        return out.flatten(0, 1).index_select(0, self.place)


class DistanceProjections(nn.Module):
    """A layer's keys and queries of distances."""

    def __init__(self, options: Disentangled, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.options = heads, options
        own = not options.shared
        self.key = nn.Linear(hidden, hidden) if own and options.content_to_position else None
        self.query = nn.Linear(hidden, hidden) if own and options.position_to_content else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Tensor, qkv: nn.Linear) -> tuple[Tensor | None, Tensor | None]:
        """Keys and queries (2 * embeddings, H, D), or None where no product has them."""
        x = self.dropout(embeddings)
        if self.options.shared:
            (query, key, _), biases = qkv.weight.chunk(3), qkv.bias.chunk(3)
            keys = F.linear(x, key, biases[1]) if self.options.content_to_position else None
            queries = F.linear(x, query, biases[0]) if self.options.position_to_content else None
        else:
            keys, queries = (None if project is None else project(x) for project in (self.key, self.query))
        keys, queries = (None if x is None else x.unflatten(-1, (self.heads, -1)) for x in (keys, queries))
        return keys, queries


def bias_of_pairs(q: Tensor, k: Tensor, keys: Tensor | None, queries: Tensor | None) -> Tensor:
    """(batch, heads, queries, keys), as a peer takes it; arguments as of `attend`."""
    i = torch.arange(q.shape[1], device=q.device)
    distance = i - i[:, None]  # j - i
    bias = torch.zeros((), dtype=q.dtype, device=q.device)
    for x, positions, index in ((q, keys, distance), (k, queries, distance.T)):
        if positions is not None:
            reach = len(positions) // 2
            table = products(x, positions)
            of_pairs = table.gather(-1, (index.clamp(-reach, reach) + reach).expand(*table.shape[:3], -1))
            bias = bias + (of_pairs if x is q else of_pairs.mT)
    return bias
