"""Fused attention for PyTorch in which the direction is data: bidirectional, causal and everything between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backends import backends
from .functional import attention, explain, merge_attention, varlen_attention
from .integrations import swap
from .mask import Mask, causal, full, prefix_lm, sliding_window
from .paged.functional import copy_pages, paged_append, paged_attention

if TYPE_CHECKING:
    from .cache import OutOfPages, PagedKVCache

__all__ = [
    "Mask", "OutOfPages", "PagedKVCache", "attention", "backends", "causal", "copy_pages", "explain", "full",
    "merge_attention", "paged_append", "paged_attention", "prefix_lm", "sliding_window", "swap", "varlen_attention",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The cache, when it is first asked for: it needs a native library that an installation may lack."""
    if name in ("PagedKVCache", "OutOfPages"):
        from . import cache

        return getattr(cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
