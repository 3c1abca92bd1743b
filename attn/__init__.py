"""Fused attention for PyTorch in which the direction is data: bidirectional, causal and everything between."""

from .backends import backends
from .functional import attention, explain, merge_attention, varlen_attention
from .integrations import swap
from .mask import Mask, causal, full, prefix_lm, sliding_window
from .paged.functional import copy_pages, paged_append, paged_attention

__all__ = [
    "Mask", "attention", "backends", "causal", "copy_pages", "explain", "full", "merge_attention", "paged_append",
    "paged_attention", "prefix_lm", "sliding_window", "swap", "varlen_attention",
]  # fmt: skip
