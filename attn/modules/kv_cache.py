"""Keys and values in one piece for each sequence, as the models generate with them by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mask import Mask
from .rows import Rows, check_seqlens

if TYPE_CHECKING:
    from .gpt import GPTConfig


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
