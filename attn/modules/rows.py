"""Where the tokens of a batch lie, and which attention runs over them: the one seam between the models and attention.

`attention="duplex"` is this package, on tokens packed to (total, ...). `"sdpa"` (F.scaled_dot_product_attention) and
`"plain"` (the softmax formula) run the same weights on the padded batch, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import contents_are_readable, wrong_type
from ..functional import attention, check_tensor, varlen_attention
from ..mask import Mask, full

ATTENTIONS = ("duplex", "sdpa", "plain")


@dataclass(frozen=True)
class Scores:
    """What a layer has its own of: the keys that a query sees, itself included (None: what the mask says), and the scores' scale
    (None: head_dim ** -0.5) and softcap (0: none)."""

    window: int | None = None
    scale: float | None = None
    softcap: float = 0.0

    def mask(self, mask: Mask) -> Mask:
        """`mask`, cut to the window."""
        if self.window is None:
            return mask
        left = self.window - 1
        return mask._replace(left=left if mask.left is None else min(left, mask.left))

    def terms(self, dropout_p: float) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "dropout_p": dropout_p}


_ALL = Scores()


@dataclass
class Rows:
    """The rows of one forward pass. Activations are (total, ...) when packed (`index` is set), else (B, S, ...).

    Shapes and dtypes: positions int64 (total,) packed, else (B or 1, S); keep bool (B, S); index int64 (total,), the
    place of each packed token in the flattened batch; cu_seqlens int32 (B+1,); seqlens_q and seqlens_k int32 (B,).
    None stands for "every row is full". `past` counts the keys a cache holds before this pass (of its longest row).
    """

    attention: str
    mask: Mask
    batch: int
    seqlen: int
    positions: Tensor
    past: int = 0
    keep: Tensor | None = None
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    _visible: dict[int | None, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ids: Tensor,
        mask: Mask,
        attention: str = "duplex",
        *,
        attention_mask: Tensor | None = None,
        seqlens: Tensor | None = None,
    ) -> Rows:
        """Rows of ids (B, S) with attention_mask (B, S), nonzero = a token, or seqlens (B,), the rest being padding.

        With "duplex" the padding is dropped here, at the price of one host synchronisation (the number of tokens);
        none where the attention_mask is on the CPU.
        """
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape (batch, seqlen), got {tuple(ids.shape)}")
        if attention_mask is not None and seqlens is not None:
            raise ValueError("attention_mask: expected it or seqlens, got both")
        batch, seqlen = ids.shape
        columns = torch.arange(seqlen, device=ids.device)
        keep: Tensor | None = None
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask: expected shape {tuple(ids.shape)}, got {tuple(attention_mask.shape)}"
                )
            keep = attention_mask.bool()
        elif seqlens is not None:
            check_seqlens(seqlens, batch, seqlen)
            keep = columns.to(seqlens.device) < seqlens[:, None]
        if keep is None:
            return cls(attention, mask, batch, seqlen, columns[None])
        if attention != "duplex":
            return cls(attention, mask, batch, seqlen, columns[None], keep=keep.to(ids.device))
        index = keep.flatten().nonzero().squeeze(1).to(ids.device, non_blocking=True)
        lengths = keep.sum(1, dtype=torch.int32).to(ids.device, non_blocking=True)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        positions = index % max(seqlen, 1)
        return cls(
            attention, mask, batch, seqlen, positions, 0, None, index, cu_seqlens, seqlens_q=lengths, seqlens_k=lengths
        )

    def counted(self) -> Tensor:
        """Positions of tokens among those of their sequence, whatever padding lies between; shaped as `positions`, or (B, S)."""
        if self.cu_seqlens is not None:
            starts = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.positions))
            return torch.arange(len(self.positions), device=self.positions.device) - starts
        return self.positions if self.keep is None else (self.keep.cumsum(1) - 1).clamp(min=0)

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) as given -> the layout of the activations: (total, ...) when packed, else x itself."""
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """The layout of the activations -> (B, S, ...). Rows of padding are 0 where the batch was packed."""
        if self.index is None:
            return x
        padded = x.new_zeros(self.batch * self.seqlen, *x.shape[1:])
        return padded.index_copy(0, self.index, x).unflatten(0, (self.batch, self.seqlen))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Scores = _ALL,
        dropout_p: float = 0.0,
        distance_bias: Tensor | None = None,
    ) -> Tensor:
        """q (total, Hq, D) or (B, S, Hq, D), k and v the same with Hk heads and any strides -> out, shaped as q.

        In a pass over a cache (`past > 0`), k and v are (B, past + S, Hk, D). distance_bias (Hq, 2R + 1), as `attention` has it.
        """
        mask = scores.mask(self.mask)
        if self.attention == "duplex":
            terms = scores.terms(dropout_p) | {"distance_bias": distance_bias}
            if self.cu_seqlens is None:
                return attention(q, k, v, mask, seqlens_q=self.seqlens_q, seqlens_k=self.seqlens_k, **terms)
            cu, longest = self.cu_seqlens, self.seqlen
            return varlen_attention(q, k, v, cu, cu, longest, longest, mask, **terms)
        if distance_bias is not None:
            bias = by_pairs(distance_bias, self.past + self.seqlen, self.seqlen)
            return self.by_peer(q, k, v, hidden(bias, self.visible(mask)), scores, dropout_p)
        causal = self.attention == "sdpa" and self.past == 0 and is_causal(mask)  # right padding: no query sees it
        return self.by_peer(q, k, v, None if causal else self.visible(mask), scores, dropout_p, causal)

    def attend_other(
        self, other: Rows, q: Tensor, k: Tensor, v: Tensor, scores: Scores = _ALL, dropout_p: float = 0.0
    ) -> Tensor:
        """The same to all keys of `other`, rows of another text for each sequence (cross attention)."""
        if self.attention != "duplex":
            seen = None if other.keep is None else other.keep[:, None, None, :]  # (B, 1, 1, S)
            return self.by_peer(q, k, v, seen, scores, dropout_p)
        terms = scores.terms(dropout_p)
        if self.cu_seqlens is None and other.cu_seqlens is None:
            return attention(q, k, v, full(), **terms)
        lengths = (self.offsets, other.offsets, self.seqlen, other.seqlen)
        out = varlen_attention(self.flat(q), other.flat(k), other.flat(v), *lengths, full(), **terms)
        return out if self.cu_seqlens is not None else out.unflatten(0, (self.batch, self.seqlen))

    @cached_property
    def offsets(self) -> Tensor:
        """cu_seqlens, also where every row is full."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.positions.device) * self.seqlen

    def flat(self, x: Tensor) -> Tensor:
        """The layout of the activations -> (total, ...), whether packed or not."""
        return x if self.cu_seqlens is not None else x.flatten(0, 1)

    def by_peer(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None,
        scores: Scores,
        dropout_p: float,
        causal: bool = False,
    ) -> Tensor:
        """seen: what a query sees, bool, or what is added to its scores; broadcasting to (B, H, S, keys)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, D)
        if self.attention == "plain":
            return plain(q, k, v, seen, scores, dropout_p).transpose(1, 2)
        if scores.softcap:
            raise ValueError("attention: expected duplex or plain, which cap scores, got 'sdpa'")
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, seen, dropout_p, causal, scale=scores.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    def visible(self, mask: Mask) -> Tensor | None:
        """What the peers see: bool, broadcasting to (B, 1, S, past + S), or None for everything. Computed once for each window."""
        if mask.left not in self._visible:
            self._visible[mask.left] = self._span(mask)
        return self._visible[mask.left]

    def _span(self, mask: Mask) -> Tensor | None:
        keys = self.past + self.seqlen
        device = self.positions.device
        j = torch.arange(keys, device=device)
        seen = None if self.keep is None else self.keep[:, None, None, :]  # (B, 1, 1, S)
        if self.seqlens_k is not None:
            seen = j < self.seqlens_k[:, None, None, None]
        one_query_sees_all = is_causal(mask) and self.seqlen == 1
        if (mask.left is None and mask.right is None) or one_query_sees_all:
            return seen
        i = torch.arange(self.seqlen, device=device)[:, None]
        p = i if mask.align == "top_left" else self.positions[:, None, :, None]
        span = torch.ones((), dtype=torch.bool, device=device)
        if mask.right is not None:
            span = span & (j <= p + mask.right)
        if mask.left is not None:
            span = span & (j >= p - mask.left)
        prefix = mask.prefix[:, None, None, None] if isinstance(mask.prefix, Tensor) else mask.prefix
        span = span | (j < prefix)
        if seen is None:
            return span
        queries = torch.arange(self.seqlen, device=device)
        token = self.keep if self.seqlens_q is None else queries < self.seqlens_q[:, None]
        if token is None:
            return span & seen
        return span & seen | ~token[:, None, :, None]  # padding sees something: its NaN would spread as 0 * NaN


def by_pairs(distance_bias: Tensor, keys: int, queries: int) -> Tensor:
    """distance_bias (H, 2R + 1) for each pair, (H, queries, keys); the last query stands at the last key."""
    reach = distance_bias.shape[1] // 2
    i = torch.arange(keys - queries, keys, device=distance_bias.device)[:, None]
    j = torch.arange(keys, device=distance_bias.device)
    return distance_bias[:, (j - i).clamp(-reach, reach) + reach]


def hidden(bias: Tensor, visible: Tensor | None) -> Tensor:
    """bias, and -inf where nothing is seen."""
    return bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def plain(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scores: Scores = _ALL, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v as written, in the dtype of q; (B, H, S, D), k and v with heads that divide q's.

    seen: what a query sees, bool, or what is added to its scores.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if seen is not None:
        s = s.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else s + seen
    return F.dropout(s.softmax(-1), dropout_p) @ v


def is_causal(mask: Mask) -> bool:
    return mask.left is None and mask.right == 0 and isinstance(mask.prefix, int) and mask.prefix == 0


def check_seqlens(seqlens: Tensor, batch: int, seqlen: int, least: int = 0, name: str = "seqlens") -> None:
    """Kind and shape always, contents where they are readable (a longer one is cut to seqlen)."""
    check_tensor(name, seqlens)
    if seqlens.is_floating_point() or seqlens.is_complex() or seqlens.dtype == torch.bool:
        wrong_type(name, "integers", seqlens.dtype)
    if seqlens.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {tuple(seqlens.shape)}")
    if contents_are_readable(seqlens):
        for length in seqlens.tolist():
            if not least <= length <= seqlen:
                raise ValueError(f"{name}: expected {least} to {seqlen}, got {length}")
