"""BERT (Devlin et al. 2018, arXiv 1810.04805), RoBERTa (Liu et al. 2019, arXiv 1907.11692) and DeBERTa (He et al. 2021, arXiv
2006.03654 and 2111.09543): encoder with pooling, masked-token and classification heads.

A padded batch runs unpadded end to end: packed once at the embedding, `varlen_attention` in every layer, unpacked once
at the end. Shapes in comments: B batch, S seqlen, T total tokens without padding, C hidden, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mask import full
from .disentangled import Disentangled, DistanceEmbedding, DistanceProjections, Distances
from .parts import activate, check_activation, init_weights
from .rows import Rows

POOLER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu}


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int = 30522
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    inner: int = 3072
    max_positions: int = 512
    positions: str = "columns"  # of a padded batch; or "tokens" (RoBERTa), padding not counted; or "none"
    disentangled: Disentangled | None = None  # DeBERTa's scores, which know distances
    segments: int = 2  # first text or second; 0: they are not told apart
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooler: bool = True  # the layer over the first token
    pooler_activation: str = "tanh"  # or "gelu"
    tied: bool = True  # the masked-token head's matrix is the embedding
    labels: int = 2
    classifier_dropout: float | None = None  # None: dropout

    @classmethod
    def base(cls, **changes: Any) -> BertConfig:
        return cls(**changes)

    @classmethod
    def large(cls, **changes: Any) -> BertConfig:
        return cls(**{"hidden": 1024, "layers": 24, "heads": 16, "inner": 4096, **changes})


class BertEmbedding(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.position = None if config.positions == "none" else nn.Embedding(config.max_positions, config.hidden)
        self.segment = nn.Embedding(config.segments, config.hidden) if config.segments else None
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        x = self.word(ids)
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        if self.position is not None:
            x = x + self.position(positions)
        return self.dropout(self.norm(x))


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.heads = config.heads
        self.activation = config.activation
        self.attention_dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.distances: DistanceProjections | None = None
        if config.disentangled is not None:
            self.distances = DistanceProjections(config.disentangled, config.hidden, config.heads, config.dropout)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.attention_norm = nn.LayerNorm(config.hidden, config.eps)
        self.up = nn.Linear(config.hidden, config.inner)
        self.down = nn.Linear(config.inner, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: Rows, distances: Distances | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (T, 3, H, D)
        q, k, v = qkv.unbind(-3)  # views: their strides go to the kernel as they are
        dropout_p = self.attention_dropout if self.training else 0.0
        if distances is None or self.distances is None:
            y = rows.attend(q, k, v, dropout_p=dropout_p)
        else:
            keys, queries = self.distances(distances.embeddings, self.qkv)
            y = distances.attend(rows, q, k, v, keys, queries, dropout_p)
        return self.finish(x, y.flatten(-2))

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.out(y)))
        y = self.down(activate(self.up(x), self.activation))
        return self.norm(x + self.dropout(y))


class Bert(nn.Module):
    """The encoder.

    `bert(ids, attention_mask=...)` is the last hidden state (B, S, C); padding gives zeros (with "sdpa" and "plain",
    which compute the padding too, whatever comes of it). `bert.encode` returns it packed, with its `Rows`.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"hidden: expected a multiple of heads ({config.heads}), got {config.hidden}")
        if config.positions not in ("columns", "tokens", "none"):
            raise ValueError(f"positions: expected columns, tokens or none, got {config.positions!r}")
        if config.pooler_activation not in POOLER_ACTIVATIONS:
            known = ", ".join(POOLER_ACTIVATIONS)
            raise ValueError(f"pooler_activation: expected one of {known}, got {config.pooler_activation!r}")
        check_activation(config.activation)
        self.config = config
        self.embedding = BertEmbedding(config)
        self.distances: DistanceEmbedding | None = None
        if config.disentangled is not None:
            self.distances = DistanceEmbedding(config.disentangled, config.hidden, config.eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.hidden, config.hidden) if config.pooler else None
        self.apply(init_weights)

    def encode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        segments: Tensor | None = None,
        attention: str = "duplex",
    ) -> tuple[Tensor, Rows]:
        """ids int64 (B, S) with attention_mask (B, S) or seqlens (B,); segments int64 (B, S), all 0 by default.

        Returns hidden (T, C), or (B, S, C) where nothing is packed (no padding given, or a peer's attention), and
        the `Rows` that unpack it. Masked-out tokens may lie anywhere in a row.
        """
        if ids.dim() == 2 and ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"ids: expected at most max_positions ({self.config.max_positions}) columns, got {ids.shape[1]}"
            )
        rows = Rows.of(ids, full(), attention, attention_mask=attention_mask, seqlens=seqlens)
        positions = rows.counted() if self.config.positions == "tokens" else rows.positions
        x = self.embedding(rows.pack(ids), positions, None if segments is None else rows.pack(segments))
        distances = None if self.distances is None else self.distances(rows)
        for layer in self.layers:
            x = layer(x, rows, distances)
        return x, rows

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        segments: Tensor | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        x, rows = self.encode(ids, attention_mask, seqlens, segments, attention)
        return rows.unpack(x)

    def pool(self, hidden: Tensor, rows: Rows, kind: str = "pooler") -> Tensor:
        """One vector (B, C) a sequence, of what `encode` returned.

        kind: "first" is the hidden state of the first token ([CLS]), "pooler" that through the trained layer,
        "mean" the mean over tokens. An empty sequence gives zeros (of the state: the pooler still adds its bias).
        """
        if kind == "mean":
            if rows.index is None and rows.keep is not None:
                hidden = hidden * rows.keep[..., None]
            lengths = rows.seqlens_q if rows.keep is None else rows.keep.sum(1)
            total = rows.unpack(hidden).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
            return (total / (rows.seqlen if lengths is None else lengths.clamp(min=1)[:, None])).to(hidden.dtype)
        if kind not in ("first", "pooler"):
            raise ValueError(f"kind: expected first, pooler or mean, got {kind!r}")
        first = first_token(hidden, rows)
        if kind == "first":
            return first
        if self.pooler is None:
            raise ValueError(
                "kind: this model has no pooler (config.pooler is False); expected first or mean, got 'pooler'"
            )
        return POOLER_ACTIVATIONS[self.config.pooler_activation](self.pooler(first))


class BertMaskedLM(nn.Module):
    """Masked-token prediction; the vocabulary matrix meets only the positions asked for."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        self.dense = nn.Linear(config.hidden, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        self.decoder = nn.Linear(config.hidden, config.vocab_size)
        self.dense.apply(init_weights)
        self.decoder.apply(init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied:
            self.decoder.weight = self.bert.embedding.word.weight

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        segments: Tensor | None = None,
        masked: Tensor | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        """Logits (n, vocab_size) of the positions `masked`, in their order, or (B, S, vocab_size) without it.

        masked: bool (B, S), True at n positions (counting them is one more host synchronisation), or int64 (n,), the
        positions b * S + s. Each must hold a token: what padding would give is undefined.
        """
        x, rows = self.bert.encode(ids, attention_mask, seqlens, segments, attention)
        if masked is not None:
            x = select(x, rows, masked)
        x = self.norm(activate(self.dense(x), self.config.activation))
        x = self.decoder(x)
        return x if masked is not None else rows.unpack(x)


class BertClassifier(nn.Module):
    """Logits (B, labels) of each sequence, from the pooler over its first token."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = Bert(config)
        p = config.dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden, config.labels).apply(init_weights)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        segments: Tensor | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        x, rows = self.bert.encode(ids, attention_mask, seqlens, segments, attention)
        return self.classifier(self.dropout(self.bert.pool(x, rows)))


def first_token(hidden: Tensor, rows: Rows) -> Tensor:
    """The hidden state of column 0 (B, C), or of the first token where column 0 is padding that was dropped."""
    if rows.cu_seqlens is None:
        return hidden[:, 0]
    if hidden.shape[0] == 0:
        return hidden.new_zeros(rows.batch, hidden.shape[1])
    start, end = rows.cu_seqlens[:-1], rows.cu_seqlens[1:]
    first = hidden.index_select(0, start.clamp(max=hidden.shape[0] - 1))
    return first.masked_fill((start == end)[:, None], 0.0)


def select(x: Tensor, rows: Rows, masked: Tensor) -> Tensor:
    """The rows (n, C) of x at the positions `masked` of the batch as given: bool (B, S) or int64 (n,)."""
    if masked.dtype == torch.bool:
        if masked.shape != (rows.batch, rows.seqlen):
            raise ValueError(f"masked: expected shape ({rows.batch}, {rows.seqlen}), got {tuple(masked.shape)}")
        masked = masked.flatten().nonzero().squeeze(1)
    if rows.index is None:
        return x.flatten(0, 1).index_select(0, masked)
    return x.index_select(0, torch.searchsorted(rows.index, masked))
