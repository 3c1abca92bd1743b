"""A causal decoder that covers GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023, arXiv 2302.13971) and its relatives:
Mistral (arXiv 2310.06825), Phi-3 (2404.14219), Qwen 2 and 3 (2407.10671, 2505.09388), GLM-4 (2406.12793), Gemma 2 and 3
(2408.00118, 2503.19786).

The mask is data: causal by default, and a `Mask` with a prefix for each sequence makes any part bidirectional.
Shapes in comments: B batch, S seqlen, T total tokens without padding, C hidden, Hq/Hk heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import wrong_type, wrong_value
from ..mask import Mask, causal
from .kv_cache import KVCache
from .language_model import CacheShape, Opening
from .paged_rows import PagedRows, rows_wanted
from .parts import check_activation, gate, init_weights
from .rope import Rope, Rotary, rope_of, rope_tables, rotate
from .rope_scaling import RopeScaling, check_scaling
from .rows import Rows, Scores, check_seqlens

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache


Ropes = tuple[Rope | None, Rope | None]  # of layers that see everything, and of those with a window


@dataclass(frozen=True)
class GPTConfig:
    """The default is GPT-2 small."""

    vocab_size: int = 50257
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    heads_kv: int = 12
    head_dim: int = 64
    inner: int = 3072
    max_positions: int = 1024
    positions: str = "learned"  # or "rotary"
    norm: str = "layer"  # or "rms", or "rms_offset": Gemma's, whose weights are stored less 1
    post_norms: bool = False  # of what attention and the MLP add, too
    head_norms: bool = False  # of each head of q and k
    activation: str = "gelu_tanh"
    gated: bool = False  # down(activation(gate(x)) * up(x)), SwiGLU with silu
    attention_bias: bool = True
    out_bias: bool | None = None  # of the product behind attention; None: as attention_bias
    mlp_bias: bool = True
    tied: bool = True  # the head's matrix is the embedding
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None  # of each head, its first dimensions, which are rotated; None: all
    rope_interleaved: bool = False  # pairs of dimensions (2i, 2i + 1), not (i, i + rotary_dim / 2)
    windows: tuple[int | None, ...] = ()  # keys that a token sees in each layer, itself included; (): all
    window_rope_theta: float | None = None  # of the layers with a window, without scaling; None: as the others
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float = 0.0  # of the scores, 0: none
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def rotary(self, length: int) -> Rotary:
        """Of texts of so many tokens."""
        dim, scaling = self.head_dim if self.rotary_dim is None else self.rotary_dim, self.rope_scaling
        long = scaling is not None and scaling.is_long(length)
        return Rotary(dim, self.max_positions, self.rope_theta, scaling, self.rope_interleaved, long)

    def outgrows(self, cached: int, length: int) -> bool:
        """Whether so many tokens in a cache were rotated otherwise than a text of `length` is."""
        scaling = self.rope_scaling
        return scaling is not None and cached > 0 and scaling.is_long(length) and not scaling.is_long(cached)

    @classmethod
    def gpt2(cls, **changes: Any) -> GPTConfig:
        return cls(**changes)

    @classmethod
    def llama(cls, **changes: Any) -> GPTConfig:
        """Llama's structure at the size of SmolLM2-135M (arXiv 2502.02737)."""
        small: dict[str, Any] = {
            "vocab_size": 49152,
            "hidden": 576,
            "layers": 30,
            "heads": 9,
            "heads_kv": 3,
            "head_dim": 64,
        }
        small |= {"inner": 1536, "max_positions": 8192, "rope_theta": 100000.0}
        kind = {"positions": "rotary", "norm": "rms", "activation": "silu", "gated": True}
        return cls(**{**small, **kind, "attention_bias": False, "mlp_bias": False, **changes})


class OffsetRMSNorm(nn.Module):
    """RMSNorm by 1 + weight, in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms_offset": OffsetRMSNorm}


class GPTLayer(nn.Module):
    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.split = (config.heads, config.heads_kv, config.heads_kv)
        self.scores = Scores(config.windows[index] if config.windows else None, config.scale, config.softcap)
        width = config.heads * config.head_dim
        out_bias = config.attention_bias if config.out_bias is None else config.out_bias
        norm = partial(NORMS[config.norm], eps=config.eps)
        self.attention_norm = norm(config.hidden)
        self.qkv = nn.Linear(config.hidden, sum(self.split) * config.head_dim, config.attention_bias)
        self.q_norm = norm(config.head_dim) if config.head_norms else None
        self.k_norm = norm(config.head_dim) if config.head_norms else None
        self.out = nn.Linear(width, config.hidden, out_bias)
        self.attention_post_norm = norm(config.hidden) if config.post_norms else nn.Identity()
        self.norm = norm(config.hidden)
        self.up = nn.Linear(config.hidden, config.inner * (2 if config.gated else 1), config.mlp_bias)  # [gate, up]
        self.down = nn.Linear(config.inner, config.hidden, config.mlp_bias)
        self.post_norm = norm(config.hidden) if config.post_norms else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: Rows, ropes: Ropes, cache: KVCache | None, slots: Tensor | None) -> Tensor:
        qkv, rope = self.project(x), self.own(ropes)
        if rope is None:
            q, k, v = qkv.split(self.split, -2)
        else:
            rotated = rotate(qkv[..., : -self.split[2], :], rope)  # q and k at once
            q, k = rotated.split(self.split[:2], -2)
            v = qkv[..., -self.split[2] :, :]
        if cache is not None and slots is not None:
            k, v = cache.append(self.index, k, v, rows, slots)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        return self.finish(x, rows.attend(q, k, v, self.scores, dropout_p).flatten(-2))

    def step(self, x: Tensor, rows: PagedRows, ropes: Ropes) -> Tensor:
        """The same over a paged cache, which rotates q and k itself. x (T, C)"""
        q, k, v = rows.apply(self.project, x).split(self.split, -2)
        y = rows.attend(self.index, q, k, v, self.scores, self.own(ropes)).flatten(-2)
        return rows.apply(partial(self.finish, by_row=rows.batch_invariant), x, y)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (T, Hq + 2 Hk, D)"""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.config.head_dim))
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv.split(self.split, -2)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), -2)

    def own(self, ropes: Ropes) -> Rope | None:
        return ropes[0 if self.scores.window is None else 1]

    def finish(self, x: Tensor, y: Tensor, by_row: bool = False) -> Tensor:
        x = x + self.dropout(self.attention_post_norm(self.out(y)))
        y = gate(self.up(self.norm(x)), self.config.activation, self.config.gated, by_row)
        return x + self.dropout(self.post_norm(self.down(y)))


class GPT(nn.Module):
    """The decoder and its head. `gpt(ids)` is logits (B, S, vocab_size); `gpt.generate` decodes greedily.

    `gpt.step` is one step over a paged cache: the model's side of `duplex_attn.generate`.
    """

    can_be_invariant = True

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.heads % config.heads_kv:
            raise ValueError(f"heads: expected a multiple of heads_kv ({config.heads_kv}), got {config.heads}")
        if config.positions not in ("learned", "rotary"):
            raise ValueError(f"positions: expected learned or rotary, got {config.positions!r}")
        if config.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {config.norm!r}")
        if config.windows and len(config.windows) != config.layers:
            raise ValueError(f"windows: expected one for each of {config.layers} layers, got {len(config.windows)}")
        if config.positions == "rotary":
            check_rotary(config)
        check_activation(config.activation)
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        learned = config.positions == "learned"
        self.position = nn.Embedding(config.max_positions, config.hidden) if learned else None
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(GPTLayer(config, index) for index in range(config.layers))
        self.norm = NORMS[config.norm](config.hidden, eps=config.eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.apply(init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied:
            self.head.weight = self.word.weight

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def cache_shape(self) -> CacheShape:
        config, weight = self.config, self.head.weight
        shape = (config.layers, config.heads_kv, config.head_dim, config.head_dim)
        return CacheShape(*shape, weight.dtype, weight.device)

    @property
    def max_length(self) -> int:
        """Tokens of a sequence in a paged cache at most. With "longrope" scaling those that are short to it: the sequences of a
        step are rotated alike, and pages that a short one filled would be found for the beginning of a long one."""
        scaling, most = self.config.rope_scaling, self.config.max_positions
        return min(scaling.original_max_positions, most) if scaling is not None and scaling.is_long(most) else most

    def most_pages(self, page_size: int) -> int:
        """Of a sequence in a paged cache at most."""
        return -(-self.max_length // page_size)

    def opening(self, prompt: Sequence[int], page_size: int, bidirectional_prefix: int = 0) -> Opening:
        """A prompt is itself, and goes on."""
        return Opening(list(prompt), bidirectional_prefix, self.max_length, prompt)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.word(ids)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.position is not None:
            x = x + self.position(positions)
        return self.dropout(x)

    def ropes(self, length: int, make: Callable[[Rotary], Rope]) -> Ropes:
        if self.position is not None:
            return None, None
        rotary, theta = self.config.rotary(length), self.config.window_rope_theta
        whole = make(rotary)
        return whole, whole if theta is None else make(replace(rotary, theta=theta, scaling=None))

    def logits(self, x: Tensor) -> Tensor:
        """Of hidden states (..., C), normalised."""
        logits, cap = self.head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def encode(
        self,
        ids: Tensor,
        seqlens: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        attention: str = "duplex",
    ) -> tuple[Tensor, Rows]:
        """ids int64 (B, S), padded on the right to S where seqlens int32 (B,) is given; mask causal by default.

        With a cache, ids continue what it holds and are added to it. With "longrope" scaling the longest row, padding and what
        the cache holds included, decides for all rows whether they are long, as in transformers; no cache grows from short
        to long. Returns the last hidden state, normalised, (T, C) or (B, S, C) where nothing is packed, and the `Rows`
        that unpack it.
        """
        mask = causal() if mask is None else mask
        if cache is None:
            rows = Rows.of(ids, mask, attention, seqlens=seqlens)
        else:
            rows = cache.rows(ids, mask, attention, seqlens)
        if self.position is not None and rows.past + rows.seqlen > self.config.max_positions:
            limit, end = self.config.max_positions, rows.past + rows.seqlen
            raise ValueError(f"ids: expected at most max_positions ({limit}) tokens, got {end}")
        length = rows.past + rows.seqlen
        if self.config.outgrows(rows.past, length):
            wrong_value("ids", f"all {length} tokens of a text that is long to its rope_scaling at once", rows.seqlen)
        x = self.embed(rows.pack(ids), rows.positions)
        ropes = self.ropes(length, lambda rotary: rope_of(rows.positions, rotary, x.dtype))
        slots = None if cache is None else cache.slots(rows)
        for layer in self.layers:
            x = layer(x, rows, ropes, cache, slots)
        if cache is not None:
            cache.advance(rows)
        return self.norm(x), rows

    def forward(
        self,
        ids: Tensor,
        seqlens: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        attention: str = "duplex",
        last: bool = False,
    ) -> Tensor:
        """Logits (B, S, vocab_size), or with `last` those of each sequence's last token (B, vocab_size).

        With `last`, every sequence has a token: lengths on the CPU are checked, those on a GPU under DUPLEX_ATTN_CHECK=1.
        """
        if last:
            check_last(ids, seqlens)
        x, rows = self.encode(ids, seqlens, mask, cache, attention)
        return self.logits(last_token(x, rows, seqlens)) if last else rows.unpack(self.logits(x))

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

        ids int64 (T,): the new tokens of all sequences, one after another, as `batch.positions` counts them.
        rows int64 (n,): which of them logits are wanted for; by default the last of each sequence.
        batch_invariant: a token's logits do not depend in any bit on the other sequences, nor on how its own was cut
            into steps; slower. The mask is causal, bidirectional in the prefix that a sequence was added with.
        """
        rows = rows_wanted(ids, batch, rows)
        if batch.max_seqlen_k > self.max_length:
            name = "max_positions" if self.max_length == self.config.max_positions else "original_max_positions"
            raise ValueError(f"ids: expected at most {name} ({self.max_length}) tokens, got {batch.max_seqlen_k}")
        paged = PagedRows.of(cache, batch, batch_invariant)
        x = self.embed(ids, batch.positions.clamp(min=0))  # -1: a row of a buffer that no token is in
        ropes = self.ropes(self.max_length, lambda rotary: rope_tables(rotary, ids))
        for layer in self.layers:
            x = cast(GPTLayer, layer).step(x, paged, ropes)
        return paged.apply(lambda x: self.logits(self.norm(x)), x.index_select(0, rows))

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        new_tokens: int,
        seqlens: Tensor | None = None,
        mask: Mask | None = None,
        eos: int | None = None,
        attention: str = "duplex",
    ) -> Tensor:
        """Greedy decoding: int64 (B, new_tokens) that follow prompts ids (B, S) of seqlens (B,).

        `mask` holds for the prompt and for what follows it. Texts that become long to their rope_scaling are computed anew
        there. Where `eos` came, the rest of the row repeats it; all new_tokens steps run all the same, so no step waits for
        the host to read a token.
        """
        if isinstance(new_tokens, bool) or not isinstance(new_tokens, int):
            wrong_type("new_tokens", "an int", type(new_tokens).__name__)
        if new_tokens < 0:
            wrong_value("new_tokens", "0 or more", new_tokens)
        if ids.dim() != 2:
            wrong_value("ids", "shape (batch, seqlen)", ids.shape)
        batch, seqlen = ids.shape
        weight = self.word.weight
        capacity = seqlen + max(new_tokens - 1, 0)  # the last token is never read
        cache = KVCache(self.config, batch, capacity, weight.dtype, weight.device)
        tokens = ids.new_empty(batch, new_tokens)
        step, lengths = ids, seqlens
        done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        for i in range(new_tokens):
            if self.config.outgrows(cache.longest, cache.longest + 1):
                step, lengths = joined(ids, tokens[:, :i], seqlens)
                cache = KVCache(self.config, batch, capacity, weight.dtype, weight.device)
            token = self(step, lengths, mask, cache, attention, last=True).argmax(-1)
            if eos is not None:
                token = token.masked_fill(done, eos)
                done = done | (token == eos)
            tokens[:, i] = token
            step, lengths = token[:, None], None
        return tokens


def check_rotary(config: GPTConfig) -> None:
    name = "head_dim" if config.rotary_dim is None else "rotary_dim"
    dim = config.rotary(0).dim
    if dim % 2:
        raise ValueError(f"{name}: expected an even number with rotary positions, got {dim}")
    if not 2 <= dim <= config.head_dim:
        raise ValueError(f"{name}: expected 2 to head_dim ({config.head_dim}), got {dim}")
    if config.rope_scaling is not None:
        check_scaling(config.rope_scaling, dim)


def check_last(ids: Tensor, seqlens: Tensor | None) -> None:
    """That there is a last token of each sequence, where reading lengths does not wait for a device."""
    if ids.dim() != 2:
        return  # `Rows` names it
    batch, seqlen = ids.shape
    if seqlens is not None:
        check_seqlens(seqlens, batch, seqlen, least=1)
    elif seqlen == 0:
        wrong_value("ids", "a token of each sequence, for its last one is wanted", ids.shape)


def joined(ids: Tensor, more: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """ids (B, S) of seqlens, and in each row what follows, (B, n): together (B, S + n), and their lengths."""
    if seqlens is None:
        return torch.cat((ids, more), 1), None
    places = seqlens.to(ids.device, torch.int64)[:, None] + torch.arange(more.shape[1], device=ids.device)
    return F.pad(ids, (0, more.shape[1])).scatter(1, places, more), seqlens + more.shape[1]


def last_token(x: Tensor, rows: Rows, seqlens: Tensor | None) -> Tensor:
    """The hidden state (B, C) of each sequence's last token."""
    if rows.cu_seqlens is not None:
        return x.index_select(0, rows.cu_seqlens[1:] - 1)
    if seqlens is None:
        return x[:, -1]
    return x[torch.arange(rows.batch, device=x.device), seqlens.to(x.device, torch.int64) - 1]
