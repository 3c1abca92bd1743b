"""`attn_implementation="duplex_attn"` for models of Hugging Face transformers (5.x).

    print(duplex_attn.swap(model))   # a model already built
    register()                       # or before from_pretrained(..., attn_implementation="duplex_attn")

transformers asks two functions. The *mask* entry is called once a forward with a function of the indices (query, key)
and the padding mask; what it returns travels through the model as `attention_mask` to the *attention* entry, once a
layer. Here the mask entry runs that function on symbols, which shows the span it describes (or that it is none), and
turns padding into lengths: nothing of the size queries x keys is made. What is no span becomes a boolean bias.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_tracing

from .. import functional
from ..checks import MAX_HEAD_DIM
from ..mask import Mask
from ..modules.rows import Scores
from .pages import PagedStates, check_not_over_pages
from .span_mask import SpanMask, knows_eager_alone, span_mask

NAME = "duplex_attn"

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

    if isinstance(key, PagedStates):
        if position_bias is not None:
            raise ValueError("position_bias: expected None, got one; over pages scores have no bias")
        if dropout and module.training:
            raise ValueError("dropout: expected eval mode over pages, got training mode")
        direction = _is_causal(module) if is_causal is None else is_causal
        mask = Mask(right=0 if direction else None) if attention_mask is None else attention_mask
        scores = Scores(scale=scaling, softcap=softcap or 0.0)
        return key.pages.attend(key.layer, query, key.new, value.new, mask, scores, s_aux), None

    if not torch.compiler.is_compiling():
        check_not_over_pages()

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
    return getattr(module, "is_causal", True) and not knows_eager_alone(type(getattr(module, "config", None)))


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
        raise TypeError(
            f"model: expected a transformers model or a module that holds one, got {type(model).__name__}; models that call "
            "F.scaled_dot_product_attention run here after duplex_attn.integrations.sdpa.register()"
        )
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
