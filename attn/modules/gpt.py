"""A causal decoder that covers GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023, arXiv 2302.13971).

The mask is data: causal by default, and a `Mask` with a prefix for each sequence makes any part bidirectional.
Shapes in comments: B batch, S seqlen, T total tokens without padding, C hidden, Hq/Hk heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..checks import wrong_type, wrong_value
from ..mask import Mask, causal
from .paged_rows import PagedRows
from .rows import Rows, activate, check_activation, check_seqlens

if TYPE_CHECKING:
    from ..cache import PagedBatch, PagedKVCache


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch to longer contexts: "linear" (arXiv 2306.15595) or "llama3" (Llama 3.1's)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


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
    norm: str = "layer"  # or "rms"
    activation: str = "gelu_tanh"
    gated: bool = False  # down(activation(gate(x)) * up(x)), SwiGLU with silu
    attention_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True  # the head's matrix is the embedding
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    embedding_dropout: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0

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


class KVCache:
    """Contiguous keys and values (layers, B, capacity, Hk, D), with a length for each sequence."""

    def __init__(self, config: GPTConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        shape = (config.layers, batch, capacity, config.heads_kv, config.head_dim)
        # zeros: a peer multiplies unused values by a probability of 0, which must not meet a NaN
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.longest = 0  # keys of the longest sequence
        self.seqlens: Tensor | None = None  # int32 (B,), None where all are `longest`

    def rows(self, ids: Tensor, mask: Mask, attention: str, seqlens: Tensor | None = None) -> Rows:
        """The `Rows` of tokens (B, S) that follow what the cache holds; seqlens (B,) counts those of them in use."""
        if ids.shape[0] != self.keys.shape[1]:
            raise ValueError(f"ids: expected the cache's batch ({self.keys.shape[1]}), got {ids.shape[0]}")
        if self.longest + ids.shape[1] > self.capacity:
            room = self.capacity - self.longest
            raise ValueError(
                f"ids: expected at most {room} more tokens in a cache of {self.capacity}, got {ids.shape[1]}"
            )
        if self.longest == 0:
            return Rows.of(ids, mask, attention, seqlens=seqlens)
        if seqlens is not None:
            check_seqlens(seqlens, *ids.shape)
        rows = Rows.of(ids, mask, attention)
        rows.past = self.longest
        start = self.longest if self.seqlens is None else self.seqlens[:, None]
        rows.positions = rows.positions + start
        if self.seqlens is not None or seqlens is not None:
            rows.seqlens_q = seqlens if seqlens is None else seqlens.to(torch.int32)
            past = self.longest if self.seqlens is None else self.seqlens
            new = rows.seqlen if rows.seqlens_q is None else rows.seqlens_q
            rows.seqlens_k = torch.as_tensor(past + new, dtype=torch.int32, device=ids.device)
        return rows

    def slots(self, rows: Rows) -> Tensor:
        """int64 (T,) or (B * S,): the place of each new token in (B * capacity,)."""
        if rows.index is not None:
            return rows.index // rows.seqlen * self.capacity + rows.positions
        row = torch.arange(rows.batch, device=rows.positions.device)[:, None]
        return (row * self.capacity + rows.positions).flatten()

    def append(self, layer: int, k: Tensor, v: Tensor, rows: Rows, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (T, Hk, D) or (B, S, Hk, D); returns what to attend to: themselves, or (B, past + S, Hk, D)."""
        for held, new in ((self.keys[layer], k), (self.values[layer], v)):
            if new.dtype != held.dtype and torch.is_autocast_enabled(new.device.type):
                new = new.to(held.dtype)  # as `paged_append` has them; attention casts what is read
            held.flatten(0, 1).index_copy_(0, slots, new if new.dim() == 3 else new.flatten(0, 1))
        if rows.past == 0:
            return k, v
        end = rows.past + rows.seqlen
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, rows: Rows) -> None:
        self.longest += rows.seqlen
        if rows.seqlens_k is not None:
            self.seqlens = rows.seqlens_k
        elif rows.keep is not None:
            self.seqlens = rows.keep.sum(1, dtype=torch.int32)


class GPTLayer(nn.Module):
    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        self.split = (config.heads, config.heads_kv, config.heads_kv)
        width = config.heads * config.head_dim
        make_norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.attention_norm = make_norm(config.hidden, eps=config.eps)
        self.qkv = nn.Linear(config.hidden, sum(self.split) * config.head_dim, config.attention_bias)
        self.out = nn.Linear(width, config.hidden, config.attention_bias)
        self.norm = make_norm(config.hidden, eps=config.eps)
        self.up = nn.Linear(config.hidden, config.inner * (2 if config.gated else 1), config.mlp_bias)  # [gate, up]
        self.down = nn.Linear(config.inner, config.hidden, config.mlp_bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: Rows, rope: Rope | None, cache: KVCache | None, slots: Tensor | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.config.head_dim))  # (T, Hq + 2 Hk, D)
        if rope is None:
            q, k, v = qkv.split(self.split, -2)
        else:
            rotated = rotate(qkv[..., : -self.split[2], :], rope)  # q and k at once
            q, k = rotated.split(self.split[:2], -2)
            v = qkv[..., -self.split[2] :, :]
        if cache is not None and slots is not None:
            k, v = cache.append(self.index, k, v, rows, slots)
        y = rows.attend(q, k, v, self.config.attention_dropout if self.training else 0.0).flatten(-2)
        return self.finish(x, y)

    def step(self, x: Tensor, rows: PagedRows) -> Tensor:
        """The same over a paged cache, which rotates q and k itself. x (T, C)"""
        qkv = rows.apply(lambda x: self.qkv(self.attention_norm(x)), x).unflatten(-1, (-1, self.config.head_dim))
        y = rows.attend(self.index, *qkv.split(self.split, -2)).flatten(-2)
        return rows.apply(partial(self.finish, by_row=rows.batch_invariant), x, y)

    def finish(self, x: Tensor, y: Tensor, by_row: bool = False) -> Tensor:
        x = x + self.dropout(self.out(y))
        return x + self.dropout(self.down(self.widen(self.norm(x), by_row)))

    def widen(self, x: Tensor, by_row: bool = False) -> Tensor:
        """by_row: torch computes the last elements of a thread's share otherwise than those before them."""
        up = self.up(x)
        gate, up = up.chunk(2, -1) if self.config.gated else (up, None)
        if by_row:
            gate = torch.stack([activate(row, self.config.activation) for row in gate])
        else:
            gate = activate(gate, self.config.activation)
        return gate if up is None else gate * up


class GPT(nn.Module):
    """The decoder and its head. `gpt(ids)` is logits (B, S, vocab_size); `gpt.generate` decodes greedily.

    `gpt.step` is one step over a paged cache: the model's side of `duplex_attn.generate`.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.heads % config.heads_kv:
            raise ValueError(f"heads: expected a multiple of heads_kv ({config.heads_kv}), got {config.heads}")
        if config.positions not in ("learned", "rotary"):
            raise ValueError(f"positions: expected learned or rotary, got {config.positions!r}")
        if config.norm not in ("layer", "rms"):
            raise ValueError(f"norm: expected layer or rms, got {config.norm!r}")
        if config.positions == "rotary" and config.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number with rotary positions, got {config.head_dim}")
        check_activation(config.activation)
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        learned = config.positions == "learned"
        self.position = nn.Embedding(config.max_positions, config.hidden) if learned else None
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(GPTLayer(config, index) for index in range(config.layers))
        make_norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.norm = make_norm(config.hidden, eps=config.eps)
        self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.apply(init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tied:
            self.head.weight = self.word.weight

    def encode(
        self,
        ids: Tensor,
        seqlens: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        attention: str = "duplex",
    ) -> tuple[Tensor, Rows]:
        """ids int64 (B, S), padded on the right to S where seqlens int32 (B,) is given; mask causal by default.

        With a cache, ids continue what it holds and are added to it. Returns the last hidden state, normalised,
        (T, C) or (B, S, C) where nothing is packed, and the `Rows` that unpack it.
        """
        mask = causal() if mask is None else mask
        if cache is None:
            rows = Rows.of(ids, mask, attention, seqlens=seqlens)
        else:
            rows = cache.rows(ids, mask, attention, seqlens)
        if self.position is not None and rows.past + rows.seqlen > self.config.max_positions:
            limit, end = self.config.max_positions, rows.past + rows.seqlen
            raise ValueError(f"ids: expected at most max_positions ({limit}) tokens, got {end}")
        x = self.word(rows.pack(ids))
        rope = None
        if self.position is not None:
            x = x + self.position(rows.positions)
        else:
            rope = rope_of(rows.positions, self.config, x.dtype)
        x = self.dropout(x)
        slots = None if cache is None else cache.slots(rows)
        for layer in self.layers:
            x = layer(x, rows, rope, cache, slots)
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
        return self.head(last_token(x, rows, seqlens)) if last else rows.unpack(self.head(x))

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
        if ids.shape != batch.positions.shape:
            raise ValueError(f"ids: expected the batch's {len(batch.positions)} new tokens, got {tuple(ids.shape)}")
        if batch.max_seqlen_k > self.config.max_positions:
            limit, end = self.config.max_positions, batch.max_seqlen_k
            raise ValueError(f"ids: expected at most max_positions ({limit}) tokens, got {end}")
        if rows is None and not all(batch.new_tokens):
            wrong_value("rows", "the rows wanted, where a sequence has no new token", None)
        rope = None if self.position is not None else rope_tables(self.config, ids)
        paged = PagedRows.of(cache, batch, rope, batch_invariant)
        x = self.word(ids)
        if self.position is not None:
            x = x + self.position(batch.positions.clamp(min=0))  # -1: a row of a buffer that no token is in
        x = self.dropout(x)
        for layer in self.layers:
            x = cast(GPTLayer, layer).step(x, paged)
        if rows is None:
            rows = (batch.cu_seqlens_q[1:] - 1).clamp(min=0)  # buffers that hold no batch have rows too
        return paged.apply(lambda x: self.head(self.norm(x)), x.index_select(0, rows))

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

        `mask` holds for the prompt and for what follows it. Where `eos` came, the rest of the row repeats it; all
        new_tokens steps run all the same, so no step waits for the host to read a token.
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
            token = self(step, lengths, mask, cache, attention, last=True).argmax(-1)
            if eos is not None:
                token = token.masked_fill(done, eos)
                done = done | (token == eos)
            tokens[:, i] = token
            step, lengths = token[:, None], None
        return tokens


def check_last(ids: Tensor, seqlens: Tensor | None) -> None:
    """That there is a last token of each sequence, where reading lengths does not wait for a device."""
    if ids.dim() != 2:
        return  # `Rows` names it
    batch, seqlen = ids.shape
    if seqlens is not None:
        check_seqlens(seqlens, batch, seqlen, least=1)
    elif seqlen == 0:
        wrong_value("ids", "a token of each sequence, for its last one is wanted", ids.shape)


def last_token(x: Tensor, rows: Rows, seqlens: Tensor | None) -> Tensor:
    """The hidden state (B, C) of each sequence's last token."""
    if rows.cu_seqlens is not None:
        return x.index_select(0, rows.cu_seqlens[1:] - 1)
    if seqlens is None:
        return x[:, -1]
    return x[torch.arange(rows.batch, device=x.device), seqlens.to(x.device, torch.int64) - 1]


Rope = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D / 2) or (B or 1, S, 1, D / 2)


def rope_of(positions: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rope:
    """Rotary angles of the positions, in float32 at least, rounded to `dtype` (arXiv 2104.09864)."""
    exact = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(exact) * frequencies(config, positions)
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


Made = TypeVar("Made", Tensor, Rope)
KEPT = 8  # configurations and devices


def kept(make: Callable[[GPTConfig, torch.device], Made]) -> Callable[[GPTConfig, Tensor], Made]:
    """`make` on the device of a tensor that its result is used with, once for each configuration and device.

    What a compiler, an export or a fake mode runs has a result of its own: one tensor of its kind, kept, would be in
    every later call, and theirs cannot hold a plain one.
    """
    results: dict[tuple[GPTConfig, torch.device], Made] = {}

    @wraps(make)
    def found_or_made(config: GPTConfig, beside: Tensor) -> Made:
        device = beside.device
        if torch.compiler.is_compiling() or type(beside) is not Tensor:
            return make(config, device)
        found = results.get((config, device))
        if found is None:
            found = make(config, device)
            if all(is_plain(x) for x in ((found,) if isinstance(found, Tensor) else found)):
                if len(results) >= KEPT:
                    results.clear()
                results[config, device] = found
        return found

    return found_or_made


def is_plain(x: Tensor) -> bool:
    """Whether x holds numbers of its own, now and later: a capture's memory is the graph's."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) is Tensor and not torch._is_functional_tensor(x) and not captured


@kept
def rope_tables(config: GPTConfig, device: torch.device) -> Rope:
    """cos and sin of all positions, float32 (max_positions, D / 2)."""
    with torch.inference_mode(False):
        cos, sin = rope_of(torch.arange(config.max_positions, device=device), config, torch.float32)
        return cos.squeeze(-2), sin.squeeze(-2)


@kept
def frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """float32 (D / 2,): radians a position, stretched as config.rope_scaling says."""
    with torch.inference_mode(False):
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        freq = 1.0 / config.rope_theta**steps
        scaling = config.rope_scaling
        if scaling is None:
            return freq
        if scaling.kind == "linear":
            return freq / scaling.factor
        if scaling.kind != "llama3":
            raise ValueError(f"rope_scaling: expected linear or llama3, got {scaling.kind!r}")
        turns = scaling.original_max_positions * freq / (2 * math.pi)  # over the context the model was trained on
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 1: as it is, 0: stretched by the factor
        return freq * kept + freq / scaling.factor * (1.0 - kept)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates pairs (x[..., i], x[..., i + D/2]) of x (..., heads, D): Llama's split halves."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: normal with deviation 0.02, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
