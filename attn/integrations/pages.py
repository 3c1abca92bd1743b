"""Keys and values that lie in pages, on their way through a layer of transformers.

A layer hands its new keys and values to a cache and attends to what it gets back. From a `CacheOfPages` it gets
`PagedStates`, which pass through the layer to the attention entry and say there which pages to read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache

from ..checks import wrong_value
from ..mask import Mask
from ..modules.rows import Scores

# What layers do to each token's states by itself between the cache and attention; those in pages had it done before.
# (DeepSeek makes keys and values of what it keeps of them, JetMoe repeats heads.)
TOKENWISE = {"linear", "view", "transpose", "split", "expand", "repeat", "new_empty", "copy_", "to", "contiguous"}


_over_pages = ContextVar("over_pages", default=False)


@contextmanager
def over_pages(yes: bool = True) -> Iterator[None]:
    """A forward in which no attention may be asked for keys that are no `PagedStates`: those of tokens before would be missing."""
    token = _over_pages.set(yes)
    try:
        yield
    finally:
        _over_pages.reset(token)


def check_not_over_pages() -> None:
    if _over_pages.get():
        raise ValueError("keys: expected those that the cache gave, for others lie in pages, got a layer's own")


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
        if layer_idx not in self.places:
            wrong_value("layer_idx", f"one of the {len(self.places)} layers that the cache was made for", layer_idx)
        place = self.places[layer_idx]
        return PagedStates(key_states, self, place), PagedStates(value_states, self, place)

    def __len__(self) -> int:
        return len(self.places)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of the forward, as masks count them."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.places)

    is_linear = is_dummy = is_sliding


class PagedStates:
    """The new keys, or values, of a layer (B, Hkv, S, D), which go into pages: no tensor, for those before lie there.

    What is done to each token by itself is done to the new ones; anything else is refused.
    """

    def __init__(self, new: Tensor, pages: CacheOfPages, layer: int):
        self.new, self.pages, self.layer = new, pages, layer
        self.shape, self.dtype, self.device = new.shape, new.dtype, new.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in TOKENWISE:
            refuse(f".{name}")
        return lambda *args, **kwargs: self._done(getattr(Tensor, name), (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis):  # of head_dim alone
            refuse(f"[{index}]")
        return self._done(Tensor.__getitem__, (self, index), {})

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in TOKENWISE or not isinstance(args[0], cls):
            refuse(name)
        return args[0]._done(function, args, kwargs or {})

    def _done(self, function: Callable, args: Any, kwargs: Any) -> Any:
        """The function of the new states, again on their way to the same pages."""
        found = function(*(x.new if isinstance(x, PagedStates) else x for x in args), **kwargs)
        several = isinstance(found, (tuple, list))
        made = [PagedStates(x, self.pages, self.layer) for x in (found if several else [found])]
        return made if several else made[0]

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
