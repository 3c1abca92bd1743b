"""`attn_implementation="duplex_attn"` for models of Hugging Face transformers (5.x).

    print(duplex_attn.swap(model))   # a model already built
    register()                       # or before from_pretrained(..., attn_implementation="duplex_attn")

transformers asks two functions. The *mask* entry is called once a forward with a function of the indices (query, key)
and the padding mask; what it returns travels through the model as `attention_mask` to the *attention* entry, once a
layer. Here the mask entry runs that function on symbols, which shows the span it describes (or that it is none), and
turns padding into lengths: nothing of the size queries x keys is made. What is no span becomes a boolean bias.

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
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, __version__
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .. import functional
from ..checks import MAX_HEAD_DIM
from ..mask import Mask

NAME = "duplex_attn"

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
def _knows_eager_alone(config: type) -> bool:
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
    if _knows_eager_alone(type(config)):
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


# What changes the attention of some models, and no argument of ours says: keys chosen for each query (DeepSeek-V3.2,
# MiniMax-M3), a sink for each token (Inkling), the pages of transformers' continuous batching.
_NOT_TAKEN = ("indices", "block_indices", "sinks", "cache")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SpanMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention entry: called by a model's layers.

    query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), not repeated; returns (B, Sq, Hq, Dv) and None
    for the weights, which are never formed. attention_mask: what `span_mask` returned, or a mask of the user's, bool
    (True = keep) or floating (added), that broadcasts to (B, Hq, Sq, Sk). Without one, `is_causal` (or the module's)
    says the direction, as it does in transformers' sdpa; sliding_window is not read, the mask has it. A query that sees
    no key gives 0, where eager gives the average of all values. D and Dv up to 256 run here; a wider call goes to
    transformers' sdpa, with a warning. Raises ValueError for output_attentions=True, where a model passes it on (GPT-2,
    OPT and GPTBigCode do not: their `attentions` are empty then, as with sdpa), and for what is no attention of this
    package: keys chosen for each query, sinks for each token, continuous batching, softcap or s_aux in a wider call.
    """
    if kwargs.get("output_attentions"):
        refuse_output_attentions()
    for name in _NOT_TAKEN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, duplex_attn does not take it, "
                'use the model\'s own attention, attn_implementation="eager"'
            )

    if isinstance(attention_mask, SpanMask):
        attention_mask, is_causal = _fitting(attention_mask, query.shape[2], key.shape[2]), False
    elif attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(f"attention_mask: expected 4 dimensions (B, H, Sq, Sk), got {tuple(attention_mask.shape)}")
    causal = attention_mask is None and query.shape[2] > 1 and (_is_causal(module) if is_causal is None else is_causal)
    dropout = dropout if module.training else 0.0

    head_dim = max(query.shape[3], value.shape[3])
    placed = (
        attention_mask.placed if isinstance(attention_mask, SpanMask) else not causal or query.shape[2] == key.shape[2]
    )
    as_table = placed and head_dim <= MAX_HEAD_DIM
    distance_bias, position_bias = _by_distance(position_bias, as_table, query.shape[2], key.shape[2])
    if head_dim > MAX_HEAD_DIM and s_aux is None and not softcap:  # sdpa would leave these two out
        if not is_tracing(query):
            limit = f"head_dim: expected at most {MAX_HEAD_DIM}, got {head_dim}"
            warnings.warn(f"{limit}; transformers' sdpa computes it", stacklevel=2)
        mask = attention_mask.dense() if isinstance(attention_mask, SpanMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, causal, position_bias)

    span, starts_k, seqlens_k, bias = Mask(), None, None, position_bias
    if isinstance(attention_mask, SpanMask):
        span, starts_k, seqlens_k = attention_mask.span, attention_mask.starts_k, attention_mask.seqlens_k
        bias = _combine(position_bias, attention_mask.keys)
    elif attention_mask is not None:
        bias = _combine(position_bias, attention_mask)
    elif causal:
        span = Mask(right=0, align="top_left")

    out = functional.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        span,
        starts_k=starts_k,
        seqlens_k=seqlens_k,
        bias=bias,
        distance_bias=distance_bias,
        sink=s_aux,
        scale=scaling,
        softcap=softcap or 0.0,
        dropout_p=dropout,
    )
    return out, None


def _is_causal(module: nn.Module) -> bool:
    """Whether layers without a mask look back alone."""
    return getattr(module, "is_causal", True) and not _knows_eager_alone(type(getattr(module, "config", None)))


def _by_distance(bias: Tensor | None, as_table: bool, queries: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """A table by distance, and a bias of all pairs. A table of t5.py, whose last query stands at the last key, may become either."""
    if bias is None or bias.dim() != 5:
        return None, bias
    if bias.numel() == 0:
        return None, None
    bias = bias[0, 0, 0]
    if as_table:
        return bias, None
    reach = bias.shape[1] // 2
    j, i = torch.arange(keys, device=bias.device), torch.arange(keys - queries, keys, device=bias.device)[:, None]
    return None, bias[:, (j - i).clamp(-reach, reach) + reach][None]


def _fitting(mask: SpanMask, queries: int, keys: int) -> SpanMask | Tensor | None:
    """The mask of so many queries and keys: None, or a tensor that broadcasts, where it was made for others."""
    if mask.shape[2:] == (queries, keys):
        return mask
    if mask.hides_nothing:  # sdpa would have none: BERT, both ways, makes one for a new token and leaves out the cache
        return None
    if mask.shape[2] in (1, queries) and mask.shape[3] in (1, keys):
        return mask.dense()
    raise ValueError(f"attention_mask: expected one for {queries} queries and {keys} keys, got {mask}")


def refuse_output_attentions() -> NoReturn:
    raise ValueError(
        "output_attentions: expected False, got True; duplex_attn never forms the attention weights, "
        'use attn_implementation="eager" for them'
    )


def _combine(position_bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One bias that says both."""
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def register() -> None:
    """Make `attn_implementation="duplex_attn"` known to transformers: attention and mask, for without the mask entry a
    model would get no mask and lose its causality in silence. Some models (SAM, Falcon, GPT-Neo, GIT) look a class up by
    that name as they are built, and raise KeyError; `swap` one that is built."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, span_mask)


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did."""

    swapped: dict[str, int]  # attention class -> number of its modules that run here now
    left: dict[str, str]  # attention class -> why its modules were left as they were
    previous: dict[str, str]  # model class -> its implementation before

    def __str__(self) -> str:
        lines = [f"{kind}: {count} modules now run duplex_attn" for kind, count in self.swapped.items()]
        lines += [f"{kind}: left as it was, {reason}" for kind, reason in self.left.items()]
        return "\n".join(lines) or "no attention modules found"


def swap(model: nn.Module) -> SwapReport:
    """Run the attention of a built model here: a transformers model, or any module that holds some.

    Weights are untouched; transformers' `model.set_attn_implementation(...)`, with what the report has in `previous`,
    undoes it (of a DeBERTa, `integrations.deberta.restore(model)`). Layers of a head_dim over 256 stay with transformers'
    sdpa. Raises TypeError if there is no transformers model in `model`.
    """
    from . import deberta, t5

    register()
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise TypeError(f"model: expected a transformers model or a module that holds one, got {type(model).__name__}")
    previous = {type(part).__name__: part.config._attn_implementation for part in models}
    for part in models:  # each by itself: 5.17 passes over a part whose config is a copy of the whole's, as T5's are
        if not isinstance(part, deberta.MODELS):
            part.set_attn_implementation(NAME)
    deberta.replace(model)
    t5.replace(model)

    kinds = {type(module) for module in model.modules()}
    asks = {kind: issubclass(kind, deberta.ATTENTION) or _asks_interface(kind) for kind in kinds}
    swapped: Counter[str] = Counter()
    left: dict[str, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        if asks[type(module)]:
            own = isinstance(module, deberta.ATTENTION)
            used = NAME if own else module.config._attn_implementation  # type: ignore[union-attr]
            head_dim = getattr(module, "head_dim", getattr(module, "key_value_proj_dim", None))
            if used != NAME:
                left[kind] = f"its model refused another implementation than {used!r}"
            elif isinstance(head_dim, int) and head_dim > MAX_HEAD_DIM:
                left[kind] = f"its head_dim of {head_dim} is over {MAX_HEAD_DIM}"
            else:
                swapped[kind] += 1
        elif "Attention" in kind and not any(asks[type(part)] for part in module.modules()):
            left[kind] = "it computes attention itself instead of asking transformers' AttentionInterface"
    return SwapReport(dict(swapped), left, previous)


def _asks_interface(kind: type[nn.Module]) -> bool:
    """Whether a class of layers looks its attention up in transformers' interface when it runs."""
    if issubclass(kind, PreTrainedModel):
        return False
    methods = (inspect.unwrap(f) for base in kind.__mro__ for f in vars(base).values() if inspect.isfunction(f))
    return any("ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in methods)
