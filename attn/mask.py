"""What a query sees: a span of keys (docs/semantics.md)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor


class Mask(NamedTuple):
    """Query `i`, at position `p(i)`, sees key `j` exactly when `j < prefix or p(i) - left <= j <= p(i) + right`.

    prefix: keys that every query sees, an int >= 0 or an int32 tensor (batch,); clamped to the sequence's keys.
    left, right: inclusive distances, or None for no bound; a negative one leaves a gap.
    align: "bottom_right" puts the last query at the last key, p(i) = i + len_k - len_q; "top_left" has p(i) = i.
    """

    prefix: int | Tensor = 0
    left: int | None = None
    right: int | None = None
    align: Literal["bottom_right", "top_left"] = "bottom_right"


_FULL = Mask()
_CAUSAL = Mask(right=0)


def full() -> Mask:
    """Every query sees every key (BERT, encoders, cross attention)."""
    return _FULL


def causal() -> Mask:
    """A query sees its own position and what came before (GPT)."""
    return _CAUSAL


def prefix_lm(prefix: int | Tensor) -> Mask:
    """All see the first `prefix` keys, the rest is causal (GLM, UniLM); a tensor (batch,) chooses for each sequence."""
    return Mask(prefix=prefix, right=0)


def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """`left` keys before a query's position, itself, and `right` keys after it (Mistral: left = window - 1)."""
    return Mask(left=left, right=right)
