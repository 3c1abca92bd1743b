"""Keys and values that lie in pages, on their way through a layer of transformers.

A layer hands its new keys and values to a cache and attends to what it gets back. From a `CacheOfPages` it gets
`PagedStates`, which pass through the layer to the attention entry and say there which pages to read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache

from ..mask import Mask
from ..modules.rows import Scores


class CacheOfPages(Cache):
    """What a model of transformers takes for its cache, whose keys and values lie in pages.

    places: of the model's layers with keys of their own among the layers of the pages.
    """

    is_compileable = False

    def __init__(self, places: dict[int, int]):
        super().__init__(layers=[])
        self.places = places

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores, sink: Tensor | None
    ) -> Tensor:
        """Stores key (B, Hkv, S, D) and value (B, Hkv, S, Dv); attends with query (B, Hq, S, D). Returns (B, S, Hq, Dv).

        mask: a `Mask`, or what reached the attention entry, which has the window that `scores` leaves out.
        """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        place = self.places[layer_idx]
        return PagedStates(key_states, self, place), PagedStates(value_states, self, place)

    def __len__(self) -> int:
        return len(self.places)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.places)

    is_linear = is_dummy = is_sliding


class PagedStates:
    """The new keys, or values, of a layer (B, Hkv, S, D), which go into pages: no tensor, for those before lie there."""

    def __init__(self, new: Tensor, pages: CacheOfPages, layer: int):
        self.new, self.pages, self.layer = new, pages, layer
        self.shape, self.dtype, self.device = new.shape, new.dtype, new.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse(getattr(function, "__name__", str(function)))

    def __repr__(self) -> str:
        return f"PagedStates(layer={self.layer}, new={tuple(self.shape)})"


def refuse(what: str) -> NoReturn:
    raise ValueError(
        f"keys and values: expected to be handed to transformers' AttentionInterface as the cache gave them, got {what}: "
        "this model computes with them, and they lie in pages"
    )


def windowed(scores: Scores, mask: Any) -> Scores:
    """The scores of a layer, with the window of its mask. Raises ValueError for a mask that is not causal, or no span."""
    span = mask if isinstance(mask, Mask) else getattr(mask, "span", None)
    if not isinstance(span, Mask) or span.right != 0 or getattr(mask, "keys", None) is not None:
        got = mask if isinstance(span, Mask) else f"a tensor {tuple(mask.shape)}"
        raise ValueError(f"attention_mask: expected that of a causal model, or a window, over pages, got {got}")
    return scores if span.left is None else Scores(span.left + 1, scores.scale, scores.softcap)
