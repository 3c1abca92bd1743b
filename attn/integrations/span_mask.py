"""What the mask functions of transformers say, as spans and lengths: `span_mask`, the mask entry of transformers.py.

What travels is a `SpanMask`: a plain object, as the `BlockMask` of transformers' own flex_attention is, so every place
that a mask passes is ready for it. It holds no reference to the cache, whose counters change under it, and no global is
involved, so forwards may be nested, interleaved and recomputed (gradient checkpointing). torch.compile traces through
it with its integers symbolic, which it does not do for a tensor subclass. A model that computes with its mask (slices
it, combines it) gets the boolean tensor that the sdpa implementation would have had. A model that knows eager alone
gets eager's floating tensor whether it does or not, for most of these add it to their scores.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, __version__
from transformers.masking_utils import causal_mask_function, eager_mask, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from ..mask import Mask

if "q_offset" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(f"transformers: expected a version whose masks take q_offset, as 5.8 does, got {__version__}")


class SpanMask:
    """What the queries of one forward see: a span, cut to each sequence's keys.

    span: da.Mask over keys counted from the sequence's start.
    starts_k, seqlens_k: int32 (batch,) or None; where the keys of each sequence lie in their padded row.
    keys: bool (batch, 1, 1, keys), True for what may be seen, or None; padding that is not one run, or was not read.
    shape: (batch, 1, queries, keys), of the boolean mask that this stands for.
    placed: whether distances of the span are those of the stored queries and keys, as a bias by distance wants them.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(
        self,
        span: Mask,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        starts_k: Tensor | None = None,
        seqlens_k: Tensor | None = None,
        keys: Tensor | None = None,
        placed: bool = True,
    ):
        self.span, self.shape, self.device, self.placed = span, shape, device, placed
        self.starts_k, self.seqlens_k, self.keys = starts_k, seqlens_k, keys

    def dense(self) -> Tensor:
        """The same mask as a boolean tensor (batch, 1, queries, keys), for code that reads masks."""
        queries, keys = self.shape[2:]
        i = torch.arange(queries, device=self.device)[:, None]
        j = torch.arange(keys, device=self.device)
        length: Tensor | int = keys if self.seqlens_k is None else self.seqlens_k[:, None, None, None]
        if self.starts_k is not None:
            j = j - self.starts_k[:, None, None, None]
        distance = j - i if self.span.align == "top_left" else j - (i + length - queries)
        seen = ((j >= 0) & (j < length)).expand(self.shape)
        if self.span.left is not None:
            seen = seen & (distance >= -self.span.left)
        if self.span.right is not None:
            seen = seen & (distance <= self.span.right)
        return seen if self.keys is None else seen & self.keys

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self, *args: Any, **kwargs: Any) -> SpanMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> SpanMask | Tensor:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (None, torch.bool):
            return self.dense().to(*args, **kwargs)
        target = device or self.device
        starts_k, seqlens_k, keys = (
            None if x is None else x.to(target) for x in (self.starts_k, self.seqlens_k, self.keys)
        )
        return SpanMask(self.span, self.shape, target, starts_k, seqlens_k, keys, self.placed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise TypeError(f"attention_mask: expected no change in place, got .{name}(): a SpanMask has no elements")
        return getattr(self.dense(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("attention_mask: expected no change in place, got an assignment: a SpanMask has no elements")

    @property
    def hides_nothing(self) -> bool:
        return self.span.left is self.span.right is self.starts_k is self.seqlens_k is self.keys is None

    def _add(self, other: Any) -> Any:
        """BEiT adds its mask to a position bias; of one that hides nothing, the bias is the sum."""
        return other if self.hides_nothing and isinstance(other, Tensor) else self._refuse_sum()

    @staticmethod
    def _refuse_sum(*args: Any) -> Any:
        raise TypeError(
            "attention_mask: expected a model that asks transformers' AttentionInterface, got one that adds its mask to "
            'scores itself; use attn_implementation="eager" for it'
        )

    add = __add__ = __radd__ = _add
    sub = __sub__ = __rsub__ = _refuse_sum  # of a boolean mask, a difference is never what was meant

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ADDITIONS and len(args) == 2 and not kwargs:
            mask, other = args if isinstance(args[0], SpanMask) else args[::-1]
            return mask._add(other)
        if function in _ADDITIONS or function in _SUBTRACTIONS:
            cls._refuse_sum()

        def plain(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(plain(y) for y in x)
            return x.dense() if isinstance(x, SpanMask) else x

        return function(*plain(args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    def __repr__(self) -> str:
        lengths = "".join(f", {n}" for n in ("starts_k", "seqlens_k", "keys") if getattr(self, n) is not None)
        return f"SpanMask({self.span}{lengths}, shape={self.shape})"


_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_SUBTRACTIONS = (
    torch.sub, torch.rsub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.subtract, Tensor.subtract_, Tensor.__sub__,
    Tensor.__rsub__, Tensor.__isub__,
)  # fmt: skip


def _on_dense(name: str) -> Callable:
    return lambda self, *args: getattr(self.dense(), name)(*args)


for _name in (  # operators are looked up on the type, past __getattr__
    "eq", "ne", "lt", "le", "gt", "ge", "and", "rand", "or", "ror", "xor", "rxor", "mul", "rmul",
    "invert", "getitem", "len", "bool", "iter",
):  # fmt: skip
    setattr(SpanMask, f"__{_name}__", _on_dense(f"__{_name}__"))


class _Unreadable(TypeError):
    """The mask function does something that no span does."""


class _Reach:
    """Keys at `low <= key - query <= high`, None for no bound: what a comparison of two indices says."""

    device = None  # and_masks brings its parts to one device

    def __init__(self, low: int | None = None, high: int | None = None):
        self.low, self.high = low, high

    @property
    def unbounded(self) -> bool:
        return self.low is None and self.high is None

    def to(self, *args: Any, **kwargs: Any) -> _Reach:
        return self

    def __and__(self, other: _Reach) -> _Reach:
        if not isinstance(other, _Reach):
            raise _Unreadable
        low = other.low if self.low is None else self.low if other.low is None else max(self.low, other.low)
        high = other.high if self.high is None else self.high if other.high is None else min(self.high, other.high)
        return _Reach(low, high)

    def __bool__(self) -> bool:
        raise _Unreadable

    def span(self, offset: int, align: str) -> Mask | None:
        """As a da.Mask whose p(i) lies `offset` keys before the query; None where a distance would be negative."""
        left = None if self.low is None else -self.low - offset
        right = None if self.high is None else self.high + offset
        if (left is not None and left < 0) or (right is not None and right < 0):
            return None
        return Mask(left=left, right=right, align=align)  # type: ignore[arg-type]


class _Symbol:
    """An argument of a mask function of which nothing is known: batch and head."""

    def __eq__(self, other: object) -> bool:
        raise _Unreadable

    def __bool__(self) -> bool:
        raise _Unreadable

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Unreadable


class _Index(_Symbol):
    """`query * q + key * k + constant`, where of q and k, the indices of a query and a key, only >= 0 is known."""

    def __init__(self, query: int, key: int, constant: int = 0):
        self.query, self.key, self.constant = query, key, constant

    def __neg__(self) -> _Index:
        return _Index(-self.query, -self.key, -self.constant)

    def __add__(self, other: _Index | int) -> _Index:
        if isinstance(other, int):
            return _Index(self.query, self.key, self.constant + other)
        if isinstance(other, _Index):
            return _Index(self.query + other.query, self.key + other.key, self.constant + other.constant)
        raise _Unreadable

    __radd__ = __add__

    def __sub__(self, other: _Index | int) -> _Index:
        return self + -other

    def __rsub__(self, other: int) -> _Index:
        return -self + other

    def __abs__(self) -> _Distance:
        return _Distance(self)

    def __ge__(self, other: _Index | int) -> _Reach:
        return _not_negative(self - other)

    def __gt__(self, other: _Index | int) -> _Reach:
        return _not_negative(self - other - 1)

    def __le__(self, other: _Index | int) -> _Reach:
        return _not_negative(-(self - other))

    def __lt__(self, other: _Index | int) -> _Reach:
        return _not_negative(-(self - other) - 1)

    def new_ones(self, *args: Any, **kwargs: Any) -> _Reach:
        return _Reach()  # where and_masks starts


class _Distance(_Symbol):
    """|index|"""

    def __init__(self, index: _Index):
        self.index = index

    def __le__(self, other: int) -> _Reach:
        return _not_negative(-self.index + other) & _not_negative(self.index + other)

    def __lt__(self, other: int) -> _Reach:
        return self <= other - 1


def _not_negative(index: _Index) -> _Reach:
    """What `index >= 0` says of key - query."""
    sign, constant = (index.query, index.key), index.constant
    if sign == (-1, 1):
        return _Reach(low=-constant)
    if sign == (1, -1):
        return _Reach(high=constant)
    if sign in ((0, 0), (0, 1), (1, 0)) and constant >= 0:
        return _Reach()
    raise _Unreadable


def _read(mask_function: Callable) -> _Reach | None:
    """The distances that a mask function lets through, by running it on symbols; None if it does anything else."""
    try:
        reach = mask_function(_Symbol(), _Symbol(), _Index(1, 0), _Index(0, 1))
    except Exception:  # anything may happen in a function of the user; run on real indices it shows its own errors
        return None
    return reach if isinstance(reach, _Reach) else None


@cache
def _models_know_eager_alone(config: type) -> bool:
    for kind in config.__mro__:  # a config made by hand may extend one that has models
        module = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
        classes: list[Any] = [x for x in vars(module or object).values() if isinstance(x, type)]
        models = [x for x in classes if issubclass(x, PreTrainedModel) and x.config_class is kind]
        if models:
            return not any(x._supports_sdpa or x._supports_flash_attn or x._supports_flex_attn for x in models)
    return False


@torch.compiler.assume_constant_result  # Dynamo would trace through what is cached
def knows_eager_alone(config: type) -> bool:
    """Whether the models of a class of configs take eager's masks alone, and look both ways without one."""
    return _models_know_eager_alone(config)


def span_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | SpanMask | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> SpanMask | Tensor | None:
    """The mask entry: called by transformers' `create_*_mask` functions, with the arguments of its `sdpa_mask`.

    Query i stands at position i + q_offset (a tensor with a static cache), key j at j + kv_offset; attention_mask is
    the padding mask, bool (batch, positions). Returns a SpanMask or, for what is none, bool (batch, 1, queries, keys);
    for the config of models that know eager alone, what eager has: a floating mask, or None where nothing is hidden.
    Costs one host check when there is a padding mask; while a graph is traced or captured nothing is read, and the
    padding is kept as a bias of one row.
    """
    if isinstance(attention_mask, SpanMask):  # prepared before the forward, by generate with a static cache
        return attention_mask

    if attention_mask is not None and attention_mask.dim() != 2:
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected 2 dimensions (batch, positions), or a mask with 4, got {got}")

    call: dict[str, Any] = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )
    if knows_eager_alone(type(config)):
        return eager_mask(allow_is_bidirectional_skip=allow_is_bidirectional_skip, **call)

    tracing = is_tracing(attention_mask)
    # Dynamo cannot trace a tensor indexed by symbols; a skip is allowed only where the function has no tensor in it.
    readable = not tracing or allow_is_causal_skip or allow_is_bidirectional_skip
    reach = _read(mask_function) if readable else None
    mask = None
    if reach is not None:
        shape = (batch_size, 1, q_length, kv_length)
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        keys = None if padding is None else padding[:, kv_offset : kv_offset + kv_length].bool()
        if keys is not None and not tracing:
            mask, keys, q_offset = _from_lengths(reach, shape, q_offset, kv_offset, keys, device)
        if mask is None:
            mask = _from_offsets(reach, shape, q_offset, kv_offset, keys, device)
    if mask is not None:
        return mask
    return sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **call)


def _from_offsets(
    reach: _Reach,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    keys: Tensor | None,
    device: torch.device | str,
) -> SpanMask | None:
    """The mask of a call whose sequences all see the same keys, but for those that `keys` (batch, keys) hides."""
    batch, _, q_length, kv_length = shape
    if keys is not None:
        keys = keys[:, None, None, :]
    offset = q_offset - kv_offset  # query i stands beside the stored key i + offset
    end = q_length + offset  # no key of its own lies after the last query
    span, placed = None, True
    if isinstance(end, int) and end == kv_length:
        span = reach.span(0, "bottom_right")
    elif isinstance(offset, int):
        span, placed = reach.span(offset, "top_left"), offset == 0
    elif reach.unbounded:
        span, placed = reach.span(0, "top_left"), False
    if span is not None:
        return SpanMask(span, shape, device, keys=keys, placed=placed)

    # Causal, in a cache longer than what it holds: what lies after the last query is seen by none.
    span = reach.span(0, "bottom_right")
    if span is None or span.right != 0 or (isinstance(end, int) and end > kv_length):
        return None
    if isinstance(end, Tensor):
        seqlens_k = end.to(torch.int32).repeat(batch)
    else:
        seqlens_k = torch.full((batch,), end, dtype=torch.int32, device=device)
    return SpanMask(span, shape, device, seqlens_k=seqlens_k, keys=keys)


def _from_lengths(
    reach: _Reach,
    shape: tuple[int, int, int, int],
    q_offset: int | Tensor,
    kv_offset: int,
    keys: Tensor,
    device: torch.device | str,
) -> tuple[SpanMask | None, Tensor | None, int]:
    """The mask of a call with padding, `keys` (batch, keys) bool, after one look at its contents.

    Returns (mask, or None if its padding is not one run of keys a sequence; the padding left to apply; q_offset read).
    """
    q_length, kv_length = shape[2:]
    host = keys.cpu().numpy()  # small operations: on the host each costs a tenth of what it does in torch
    q_offset = int(q_offset)
    if host.all():
        return None, None, q_offset
    start = host.argmax(1)  # (batch,)
    end = kv_length - host[:, ::-1].argmax(1)
    count = host.sum(1)
    query_end = q_length + q_offset - kv_offset  # the stored key just past the last query's own

    span, placed = None, True
    one_run = (count == end - start).all()
    if one_run and (end == query_end).all():  # left padding
        span = reach.span(0, "bottom_right")
    elif one_run and not start.any():  # right padding
        span, placed = reach.span(q_offset - kv_offset, "top_left"), q_offset == kv_offset
    elif one_run and reach.unbounded:
        span, placed = reach.span(0, "top_left"), False
    if span is None:
        return None, keys, q_offset

    def lengths(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.astype(np.int32)).to(device)

    starts_k = lengths(start) if start.any() else None
    return SpanMask(span, shape, device, starts_k, lengths(count), placed=placed), None, q_offset
