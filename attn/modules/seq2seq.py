"""An encoder and a decoder that reads it: T5 (Raffel et al. 2020, arXiv 1910.10683) and its relatives mT5, Flan-T5 and UMT5;
BART (Lewis et al. 2019, arXiv 1910.13461).

The encoder sees all of itself, the decoder its past and all of the encoder: three spans, and the same kernels.
Shapes in comments: B batch, S source's and N target's seqlen, T tokens without padding, C hidden, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import wrong_value
from ..mask import causal, full
from .distances import DistanceBias, all_buckets
from .language_model import CacheShape, Opening
from .paged_pairs import PagedPairs
from .parts import check_activation, gate, init_weights
from .rows import Rows, Scores, check_seqlens

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache


class RMSNorm(nn.RMSNorm):
    """Of float32 too where the weight is float16, as which the result comes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or self.weight.dtype != torch.float16:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": RMSNorm}


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The default is T5 small."""

    vocab_size: int = 32128
    hidden: int = 512
    layers: int = 6  # of the encoder
    decoder_layers: int = 6
    heads: int = 8
    head_dim: int = 64
    inner: int = 2048
    decoder_inner: int | None = None  # None: inner
    positions: str = "distances"  # biases of attention to oneself; or "learned"
    buckets: int = 32  # of distances
    max_distance: int = 128
    biased_layers: str = "first"  # whose distances all share; or "each"
    max_positions: int | None = None  # of source and of target; None: no limit
    norm: str = "rms"  # or "layer"
    pre_norm: bool = True  # of what goes into attention and the MLP; else of what they are added to
    embedding_norm: bool = False
    final_norm: bool = True
    activation: str = "relu"
    gated: bool = False  # down(activation(gate(x)) * up(x))
    bias: bool = False  # of linear layers
    head_bias: bool = False
    tied: bool = True  # the head's matrix is the embedding
    scale: float | None = 1.0  # of the scores; None: head_dim ** -0.5
    embedding_scale: float = 1.0
    logit_scale: float | None = None  # None: hidden ** -0.5
    start_token: int = 0  # that a target begins with
    eps: float = 1e-6
    dropout: float = 0.1
    attention_dropout: float = 0.1
    inner_dropout: float = 0.1
    final_dropout: float = 0.1

    @classmethod
    def t5(cls, **changes: Any) -> Seq2SeqConfig:
        """T5 small, as first published."""
        return cls(**changes)

    @classmethod
    def bart(cls, **changes: Any) -> Seq2SeqConfig:
        """BART base."""
        base: dict[str, Any] = {"vocab_size": 50265, "hidden": 768, "heads": 12, "inner": 3072, "max_positions": 1024}
        base |= {
            "positions": "learned",
            "norm": "layer",
            "pre_norm": False,
            "embedding_norm": True,
            "final_norm": False,
        }
        base |= {"activation": "gelu", "bias": True, "head_bias": True, "scale": None, "logit_scale": 1.0, "eps": 1e-5}
        base |= {"start_token": 2, "inner_dropout": 0.1, "final_dropout": 0.0}
        return cls(**{**base, **changes})


class Tokens(Protocol):
    """Where the tokens of a pass lie, as layers ask for it."""

    batch_invariant: bool

    def apply(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """f of rows (T, ...), row by row the same."""

    def attend(self, layer: Seq2SeqLayer, q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None) -> Tensor: ...

    def attend_source(self, layer: Seq2SeqLayer, q: Tensor) -> Tensor: ...


class Seq2SeqLayer(nn.Module):
    def __init__(self, config: Seq2SeqConfig, index: int, decoder: bool):
        super().__init__()
        self.config, self.index = config, index
        self.scores = Scores(scale=config.scale)
        width, norm = config.heads * config.head_dim, partial(NORMS[config.norm], config.hidden, eps=config.eps)
        inner = config.decoder_inner if decoder and config.decoder_inner is not None else config.inner
        self.qkv = nn.Linear(config.hidden, 3 * width, config.bias)
        self.out = nn.Linear(width, config.hidden, config.bias)
        self.attention_norm = norm()
        self.decoder = decoder
        if decoder:
            self.source_q = nn.Linear(config.hidden, width, config.bias)
            self.source_kv = nn.Linear(config.hidden, 2 * width, config.bias)
            self.source_out = nn.Linear(width, config.hidden, config.bias)
            self.source_norm = norm()
        self.up = nn.Linear(config.hidden, inner * (2 if config.gated else 1), config.bias)  # [gate, up]
        self.down = nn.Linear(inner, config.hidden, config.bias)
        self.norm = norm()
        self.dropout = nn.Dropout(config.dropout)
        self.inner_dropout = nn.Dropout(config.inner_dropout)

    @property
    def attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def forward(self, x: Tensor, distance_bias: Tensor | None, tokens: Tokens) -> Tensor:
        q, k, v = tokens.apply(self.project, x).unbind(-3)
        x = tokens.apply(self.join, x, tokens.attend(self, q, k, v, distance_bias).flatten(-2))
        if self.decoder:
            q = tokens.apply(self.ask, x)
            x = tokens.apply(self.join_source, x, tokens.attend_source(self, q).flatten(-2))
        return tokens.apply(partial(self.feed, by_row=tokens.batch_invariant), x)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (T, 3, H, D)"""
        return self.qkv(self.before(self.attention_norm, x)).unflatten(-1, (3, self.config.heads, -1))

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        return self.after(self.attention_norm, x + self.dropout(self.out(y)))

    def ask(self, x: Tensor) -> Tensor:
        """Queries of the source (T, H, D)"""
        return self.source_q(self.before(self.source_norm, x)).unflatten(-1, (self.config.heads, -1))

    def source_keys(self, source: Tensor) -> Tensor:
        """Keys and values (T, 2, H, D) of the encoder's last hidden state."""
        return self.source_kv(source).unflatten(-1, (2, self.config.heads, -1))

    def join_source(self, x: Tensor, y: Tensor) -> Tensor:
        return self.after(self.source_norm, x + self.dropout(self.source_out(y)))

    def feed(self, x: Tensor, by_row: bool = False) -> Tensor:
        y = gate(self.up(self.before(self.norm, x)), self.config.activation, self.config.gated, by_row)
        y = self.inner_dropout(y)
        # What T5's MLPs add is beyond float16: there the product, and the sums, are float32.
        y = F.linear(y.float(), self.down.weight.float()) if x.dtype != y.dtype == torch.float16 else self.down(y)
        return self.after(self.norm, x + self.dropout(y))

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.config.pre_norm else x

    def after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.config.pre_norm else norm(x)


class Stack(nn.Module):
    """The layers of an encoder or a decoder, between the words and the last hidden state."""

    def __init__(self, config: Seq2SeqConfig, decoder: bool):
        super().__init__()
        self.config = config
        count = config.decoder_layers if decoder else config.layers
        norm = partial(NORMS[config.norm], config.hidden, eps=config.eps)
        self.position, tables = None, count if config.biased_layers == "each" else min(count, 1)
        if config.positions == "learned" and config.max_positions is not None:
            self.position, tables = nn.Embedding(config.max_positions, config.hidden), 0
        self.distances = nn.ModuleList(DistanceBias(config.heads, config.buckets) for _ in range(tables))
        self.both_ways = not decoder
        self.embedding_norm = norm() if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(Seq2SeqLayer(config, index, decoder) for index in range(count))
        self.norm = norm() if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.final_dropout = nn.Dropout(config.final_dropout)

    def forward(self, x: Tensor, positions: Tensor, tokens: Tokens) -> Tensor:
        """The last hidden state of embedded words x (T, C)."""
        if self.position is not None:
            x = x + self.position(positions)
        x = self.dropout(tokens.apply(self.embedding_norm, x))
        if x.dtype == torch.float16 and self.config.norm == "rms":
            x = x.float()
        biases = self.biases(x.device)
        for index, layer in enumerate(self.layers):
            x = layer(x, biases[index % len(biases)], tokens)
        return self.final_dropout(tokens.apply(self.norm, x))

    def biases(self, device: torch.device) -> list[Tensor | None]:
        """By distance, of each layer, or one of all."""
        if not len(self.distances):
            return [None]
        bucket = all_buckets(self.config.buckets, self.config.max_distance, self.both_ways, device)
        return [table(bucket) for table in self.distances]


@dataclass(frozen=True)
class WholeRows:
    """Tokens of sequences that a pass has whole, and of a decoder's source."""

    rows: Rows
    source: tuple[Tensor, Rows] | None = None  # its last hidden state
    batch_invariant = False

    def apply(self, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        return f(*xs)

    def attend(self, layer: Seq2SeqLayer, q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None) -> Tensor:
        return self.rows.attend(q, k, v, layer.scores, layer.attention_dropout, distance_bias)

    def attend_source(self, layer: Seq2SeqLayer, q: Tensor) -> Tensor:
        assert self.source is not None
        states, rows = self.source
        k, v = layer.source_keys(states).unbind(-3)
        return self.rows.attend_other(rows, q, k, v, layer.scores, layer.attention_dropout)


class Encoder(nn.Module):
    """The encoder alone. `encoder(ids, attention_mask=...)` is the last hidden state (B, S, C); padding gives zeros (with
    "sdpa" and "plain", which compute the padding too, whatever comes of it)."""

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        check(config)
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.stack = Stack(config, decoder=False)
        self.apply(init_weights)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.word(ids)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def encode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        attention: str = "duplex",
    ) -> tuple[Tensor, Rows]:
        """ids int64 (B, S) with attention_mask (B, S) or seqlens (B,). Padding between tokens counts in learned positions,
        as in transformers, and not in distances.

        Returns hidden (T, C), or (B, S, C) where nothing is packed (no padding given, or a peer's attention), and
        the `Rows` that unpack it.
        """
        rows = Rows.of(ids, full(), attention, attention_mask=attention_mask, seqlens=seqlens)
        check_length("ids", rows.seqlen, self.config)
        return self.stack(self.embed(rows.pack(ids)), rows.positions, WholeRows(rows)), rows

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        x, rows = self.encode(ids, attention_mask, seqlens, attention)
        return rows.unpack(x)


class Seq2Seq(nn.Module):
    """Encoder, decoder and head. `model(ids, targets)` is logits (B, N, vocab_size) of what follows each token of targets.

    `model.step` is one step over a paged cache: the model's side of `duplex_attn.generate`.
    """

    can_be_invariant = True

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Stack(config, decoder=True)
        self.head = nn.Linear(config.hidden, config.vocab_size, config.head_bias)
        self.decoder.apply(init_weights)
        self.head.apply(init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied:
            self.head.weight = self.encoder.word.weight

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
        target_seqlens: Tensor | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        """Logits (B, N, vocab_size). ids int64 (B, S) with attention_mask (B, S) or seqlens (B,); targets int64 (B, N), which
        begin with config.start_token, padded on the right to N where target_seqlens int32 (B,) is given."""
        if targets.dim() != 2:
            wrong_value("targets", "shape (batch, seqlen)", tuple(targets.shape))
        if target_seqlens is not None:
            check_seqlens(target_seqlens, targets.shape[0], targets.shape[1], name="target_seqlens")
        states, source = self.encoder.encode(ids, attention_mask, seqlens, attention)
        rows = Rows.of(targets, causal(), attention, seqlens=target_seqlens)
        check_length("targets", rows.seqlen, self.config)
        if rows.batch != source.batch:
            wrong_value("targets", f"the batch of ids ({source.batch})", rows.batch)
        x = self.encoder.embed(rows.pack(targets))
        return rows.unpack(self.logits(self.decoder(x, rows.positions, WholeRows(rows, (states, source)))))

    def logits(self, x: Tensor) -> Tensor:
        """Of last hidden states (..., C)."""
        scale = self.config.hidden**-0.5 if self.config.logit_scale is None else self.config.logit_scale
        return self.head(x if scale == 1 else x * scale)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def cache_shape(self) -> CacheShape:
        """Of the decoder's keys and values."""
        config, weight = self.config, self.head.weight
        shape = (config.decoder_layers, config.heads, config.head_dim, config.head_dim)
        return CacheShape(*shape, weight.dtype, weight.device)

    def most_pages(self, page_size: int) -> int | None:
        """Of a source and a target in a cache at most; None: no limit."""
        limit = self.config.max_positions
        return None if limit is None else 2 * -(-limit // page_size)

    def opening(self, prompt: Sequence[int], page_size: int, bidirectional_prefix: int = 0) -> Opening:
        """A prompt is the source. The target begins on a page of its own: slots between hold nothing that is read."""
        if bidirectional_prefix:
            wrong_value("bidirectional_prefix", "0, for an encoder sees all of its prompt", bidirectional_prefix)
        limit, source = self.config.max_positions, len(prompt)
        if not 0 < source <= (source if limit is None else limit):
            wrong_value("prompt", "1 token or more" if limit is None else f"1 to {limit} tokens", source)
        start = self.config.start_token
        filled = [*prompt, *[start] * (-source % page_size)]
        return Opening([*filled, start], source, None if limit is None else len(filled) + limit, ())

    @torch.inference_mode()
    def step(
        self,
        ids: Tensor,
        cache: PagedKVCache,
        batch: PagedBatch,
        rows: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Logits (n, vocab_size) after a step of several sequences over a paged cache, which `batch` describes.

        Each sequence begins with a source, its bidirectional prefix: the cache holds the keys that the decoder has of it.
        From the next page on come the target's, whose tokens are the sequence's from there.
        ids int64 (T,), rows int64 (n,) and batch_invariant as of `GPT.step`; rows name tokens of targets.
        """
        if ids.shape != batch.positions.shape:
            wrong_value("ids", f"the batch's {len(batch.positions)} new tokens", tuple(ids.shape))
        pairs = PagedPairs.of(cache, batch, batch_invariant)
        check_length("ids", max(pairs.source.longest, pairs.target.longest), self.config)
        if len(pairs.source.index):
            x = self.encoder.embed(ids.index_select(0, pairs.source.index))
            states = self.encoder.stack(x, pairs.source.positions, pairs.new_sources)
            for layer in cast("Iterable[Seq2SeqLayer]", self.decoder.layers):
                pairs.append_source(layer, *pairs.apply(layer.source_keys, states).unbind(-3))
        wanted = pairs.rows_of(rows)
        if not len(pairs.target.index):
            return self.head.weight.new_empty(0, self.vocab_size)
        x = self.encoder.embed(ids.index_select(0, pairs.target.index))
        x = self.decoder(x, pairs.target.positions, pairs)
        return pairs.apply(self.logits, x.index_select(0, wanted))


def check(config: Seq2SeqConfig) -> None:
    if config.positions not in ("distances", "learned"):
        raise ValueError(f"positions: expected distances or learned, got {config.positions!r}")
    if config.positions == "learned" and config.max_positions is None:
        raise ValueError("max_positions: expected a number with learned positions, got None")
    if config.biased_layers not in ("first", "each"):
        raise ValueError(f"biased_layers: expected first or each, got {config.biased_layers!r}")
    if (
        config.positions == "distances" and config.buckets < 4
    ):  # one of each side for distances 0 and more, and one to share
        raise ValueError(f"buckets: expected 4 or more, got {config.buckets}")
    if config.positions == "distances" and config.max_distance <= config.buckets // 2:
        least = config.buckets // 2 + 1  # half of a decoder's buckets are for distances of their own
        raise ValueError(
            f"max_distance: expected {least} or more with {config.buckets} buckets, got {config.max_distance}"
        )
    if config.norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {config.norm!r}")
    check_activation(config.activation)


def check_length(name: str, length: int, config: Seq2SeqConfig) -> None:
    if config.max_positions is not None and length > config.max_positions:
        wrong_value(name, f"at most max_positions ({config.max_positions}) tokens", length)
