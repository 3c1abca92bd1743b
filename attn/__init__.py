"""Fused attention for PyTorch in which the direction is data: bidirectional, causal and everything between."""

from .backends import backends
from .functional import attention, explain, merge_attention, varlen_attention
from .integrations import swap
from .mask import Mask, causal, full, prefix_lm, sliding_window

__all__ = [
    "Mask", "attention", "backends", "causal", "explain", "full", "merge_attention", "prefix_lm", "sliding_window",
    "swap", "varlen_attention",
]  # fmt: skip
