"""Every model that calls `torch.nn.functional.scaled_dot_product_attention`, on these kernels.

    from duplex_attn.integrations import sdpa

    sdpa.register()     # from here on, in this process: timm, diffusers, nanoGPT, torch.nn.Transformer ...
    sdpa.unregister()   # torch's own again

Of models of transformers `duplex_attn.swap` knows more: windows, prefixes and padding, which sdpa gets as a mask of all pairs.
"""

from __future__ import annotations

import sys
import warnings
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor, nested_view_from_values_offsets
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import functional
from ..backends import without_kernels
from ..checks import MAX_HEAD_DIM
from ..mask import Mask, full

_torch_attention = torch._C._nn.scaled_dot_product_attention
_FULL, _UPPER_LEFT, _LOWER_RIGHT = full(), Mask(right=0, align="top_left"), Mask(right=0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register() -> None:
    """Put the function of this file in the place of torch's, there and in every loaded module that imported it by name.

    For the process and all its threads; what torch.compile made notices. Not everything asks for sdpa: nn.MultiheadAttention
    does not where it returns weights, nor in inference, as long as `torch.backends.mha.set_fastpath_enabled(False)` was not
    called.
    """
    _put(scaled_dot_product_attention, in_place_of=_torch_attention)


def unregister() -> None:
    """Undo `register`."""
    _put(_torch_attention, in_place_of=scaled_dot_product_attention)


def _put(function: Any, in_place_of: Any) -> None:
    left_alone = ("torch", __name__.split(".")[0])
    for name, module in list(sys.modules.items()):
        if module is F or (isinstance(module, ModuleType) and name.split(".")[0] not in left_alone):
            names = object.__getattribute__(module, "__dict__")  # module.__dict__ would load a lazy one
            for attribute, value in list(names.items()):
                if value is in_place_of:
                    names[attribute] = function


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function of that name: query (..., Hq, L, E), key (..., Hkv, S, E), value (..., Hkv, S, Ev) -> (..., Hq, L, Ev).

    attn_mask: bool (True = keep) or floating (added), broadcasts to (..., Hq, L, S), or one of `torch.nn.attention.bias`.
    is_causal: query i sees keys up to i. enable_gqa: Hq may be a multiple of Hkv; otherwise all but the last two
    dimensions broadcast. Jagged tensors (B, H, ragged, E) run packed, causal ones too.
    What these kernels do not take (E over 256, float64, other devices, torch.jit and torch.fx ...) torch computes, with a
    warning that says why, and without one whatever is called under `torch.nn.attention.sdpa_kernel`, which asks for kernels
    of torch. There are no second and no forward-mode derivatives. The result lies in memory as (..., L, Hq, Ev), so `view` may
    want `reshape`. Errors are those of torch or of `duplex_attn.attention`.
    """
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None or _torch_kernels_are_chosen():
        if reason is not None and not torch.compiler.is_compiling():
            warnings.warn(f"{reason}; torch's own scaled_dot_product_attention computes it", stacklevel=2)
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    span = _UPPER_LEFT if is_causal else _FULL
    if isinstance(attn_mask, CausalBias):
        span = _UPPER_LEFT if attn_mask.variant == CausalVariant.UPPER_LEFT else _LOWER_RIGHT
        attn_mask = None
    terms: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    if query.is_nested:
        return _jagged(query, key, value, span, **terms)
    if query.dim() == key.dim() == value.dim() == 4:
        (batch, heads), k_front, v_front = query.shape[:2], key.shape[:2], value.shape[:2]
        if batch == k_front[0] and k_front == v_front and (enable_gqa or heads == k_front[1]):
            return _dense(query, key, value, span, bias=attn_mask, **terms)
    return _folded(query, key, value, span, attn_mask, enable_gqa, **terms)


# TorchScript compiles calls of it to torch's own.
torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


def _dense(q: Tensor, k: Tensor, v: Tensor, span: Mask, **terms: Any) -> Tensor:
    """(B, heads, rows, head_dim)"""
    return functional.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), span, **terms).transpose(1, 2)


def _folded(
    query: Tensor, key: Tensor, value: Tensor, span: Mask, attn_mask: Tensor | None, enable_gqa: bool, **terms: Any
) -> Tensor:
    """Of any number of dimensions in front, which broadcast."""
    one_head = query.dim() == key.dim() == value.dim() == 2
    tensors = [x if x.dim() > 2 else x[None] for x in (query, key, value)]
    front = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    if not enable_gqa:
        tensors = _same_heads(*tensors)
    if attn_mask is not None and attn_mask.dim() > 3:
        one_mask = prod(attn_mask.shape[:-3]) == 1
        attn_mask = attn_mask.flatten(0, -4) if one_mask else _as_batch(attn_mask, front)
    q, k, v = (_as_batch(x, front) for x in tensors)
    out = _dense(q, k, v, span, bias=attn_mask, **terms)
    out = out.view(front + out.shape[1:])
    return out[0] if one_head else out


def _same_heads(*tensors: Tensor) -> list[Tensor]:
    """One head of keys and values serves all of queries as it is; any other broadcast is made."""
    heads = [x.shape[-3] for x in tensors]
    if heads[1:] == [1, 1]:
        return list(tensors)
    (most,) = torch.broadcast_shapes(*((n,) for n in heads))
    return [x.expand(*x.shape[:-3], most, -1, -1) for x in tensors]


def _as_batch(x: Tensor, front: torch.Size) -> Tensor:
    """(..., H, n, m) as (prod(front), H, n, m)"""
    return x.expand(*front, *x.shape[-3:]).reshape(prod(front), *x.shape[-3:])


def _jagged(query: Any, key: Any, value: Any, span: Mask, **terms: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, ragged, H, E), as it lies in memory
    cu_seqlens = q.offsets().int(), k.offsets().int()
    out = functional.varlen_attention(
        q.values(), k.values(), v.values(), *cu_seqlens, _longest(q), _longest(k), span, **terms
    )
    lengths = {"min_seqlen": q._maybe_min_seqlen, "max_seqlen": q._maybe_max_seqlen}
    return nested_view_from_values_offsets(out, q.offsets(), **lengths).transpose(1, 2)


def _longest(x: Any) -> int:
    """An upper bound, if nobody has read the offsets yet: to read them would wait for the device."""
    known = x._maybe_max_seqlen
    return x.values().shape[0] if known is None else known


@torch.compiler.assume_constant_result  # Dynamo would trace through what is cached
def _without_kernels(device: torch.device) -> str | None:
    return without_kernels(device)


@torch.compiler.assume_constant_result
def _torch_kernels_are_chosen() -> bool:
    """By `sdpa_kernel`, or for good by torch.backends.cuda.enable_flash_sdp(False) and its kin.

    To leave out cuDNN's alone, as x-transformers does, is no choice.
    """
    at = torch._C
    return not (at._get_flash_sdp_enabled() and at._get_mem_efficient_sdp_enabled() and at._get_math_sdp_enabled())


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why torch computes the call, or says what is wrong with it."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # a proxy of torch.fx, which torch's own records
            return f"{name}: expected a tensor, got {type(x).__name__}"
    if torch.jit.is_tracing():
        return "torch.jit.trace would keep the sizes of one call"
    if any(x.is_nested for x in tensors.values()) and (reason := _why_not_jagged(tensors, attn_mask)):
        return reason
    for name, x in tensors.items():
        if x.dim() < 2:
            return f"{name}: expected at least 2 dimensions, got {x.dim()}"
        if x.dtype not in _DTYPES:
            return f"{name}: expected float32, float16 or bfloat16, got {x.dtype}"
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            return f"{name}: expected a head_dim of 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}"
        if is_traceable_wrapper_subclass(x) and not x.is_nested:
            return f"{name}: expected a plain tensor, got a {type(x).__name__}"
    if enable_gqa and key.dim() > 2 and value.dim() > 2 and key.shape[-3] != value.shape[-3]:
        return f"value: expected as many heads as key ({key.shape[-3]}), got {value.shape[-3]}"
    if attn_mask is not None:
        if is_causal:
            return "attn_mask: expected None where is_causal"
        if isinstance(attn_mask, CausalBias):
            given, sizes = (attn_mask.seq_len_q, attn_mask.seq_len_kv), (query.shape[-2], key.shape[-2])
            if given != sizes:
                return f"attn_mask: expected one for {sizes[0]} queries and {sizes[1]} keys, got {given}"
        elif attn_mask.dim() < 2 or attn_mask.dtype not in (torch.bool, *_DTYPES):
            got = f"{attn_mask.dtype}, {attn_mask.dim()}"
            return f"attn_mask: expected bool or floating, of 2 dimensions or more, got {got}"
    if isinstance(scale, Tensor):
        return "scale: expected a float, got a tensor"
    if not 0 <= dropout_p < 1:
        return f"dropout_p: expected [0, 1), got {dropout_p}"
    return _without_kernels(query.device)


def _why_not_jagged(tensors: dict[str, Any], attn_mask: Tensor | None) -> str | None:
    for name, x in tensors.items():
        if not isinstance(x, NestedTensor) or x.dim() != 4 or x._ragged_idx != 2 or x.lengths() is not None:
            return (
                f"{name}: expected jagged tensors (batch, heads, ragged, head_dim) without holes for all three or none"
            )
    q, k, v = tensors.values()
    if k.shape[2] != v.shape[2] or not q.shape[1] == k.shape[1] == v.shape[1]:
        return "query, key, value: expected equal heads, and key and value of the same offsets"
    return None if attn_mask is None else "attn_mask: expected None with jagged tensors"
