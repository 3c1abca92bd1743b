"""The torch operators: schemas, implementations, fakes, autograd, autocast and vmap.

Autograd is an implementation on the Autograd key with `torch.autograd.Function`, which costs a tenth of what
`torch.library.register_autograd` does with so many arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .call import Call

_CALL = """
    Tensor q, Tensor k, Tensor v,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
    Tensor? seqlens_q, Tensor? seqlens_k, Tensor? starts_q, Tensor? starts_k,
    Tensor? prefix, SymInt? left, SymInt? right, bool top_left,
    Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, Tensor? row_distance_bias, Tensor? col_distance_bias,
    Tensor? sink, float? scale, float softcap, float dropout_p, Tensor? seed, bool deterministic, bool batch_invariant
"""
_GRADS = ("q", "k", "v", "bias", "distance_bias", "row_distance_bias", "col_distance_bias", "sink")

_library = torch.library.Library("duplex_attn", "DEF")
_library.define(f"attention_forward({_CALL}, str backend) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, bool[8] output_mask, str backend)"
    f" -> ({', '.join(f'Tensor d{name}' for name in _GRADS)})",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "merge_attention(Tensor[] outs, Tensor[] lses, str backend) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
attention_forward = torch.ops.duplex_attn.attention_forward.default
attention_backward = torch.ops.duplex_attn.attention_backward.default
merge_attention = torch.ops.duplex_attn.merge_attention.default


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return backends.choose(arguments[:-1], arguments[-1]).attention_forward(*arguments[:-1])


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    return backends.choose(arguments[4:-2], arguments[-1]).attention_backward(*arguments[:-1])


def _merge(outs: list[Tensor], lses: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    return backends.choose_merge(outs, lses, backend).merge_attention(outs, lses)


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("merge_attention", _merge, "CompositeExplicitAutograd")


_WANTED = [Call._fields.index(name) for name in _GRADS]
_TENSORS = [n for n, argument in enumerate(attention_forward._schema.arguments) if "Tensor" in str(argument.type)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention_forward(*arguments)
        ctx.save_for_backward(out, lse, *[arguments[n] for n in _TENSORS])
        ctx.others = [None if n in _TENSORS else x for n, x in enumerate(arguments)]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        wanted = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(wanted)
        if dout is None and dlse is None:
            return tuple(result)
        out, lse, *tensors = ctx.saved_tensors
        *call, backend = ctx.others
        for n, tensor in zip(_TENSORS, tensors, strict=True):
            call[n] = tensor
        dout = torch.zeros_like(out) if dout is None else dout
        grads = attention_backward(dout, dlse, out, lse, *call, [wanted[n] for n in _WANTED], backend)
        for n, grad in zip(_WANTED, grads, strict=True):
            result[n] = grad if wanted[n] else None
        return tuple(result)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, parts, *outs_lses):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = merge_attention(list(outs_lses[:parts]), list(outs_lses[parts:]), backend)
        ctx.save_for_backward(out, lse, *outs_lses)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *outs_lses = ctx.saved_tensors
        outs, lses = outs_lses[: len(outs_lses) // 2], outs_lses[len(outs_lses) // 2 :]
        nothing = lse == -torch.inf
        douts, dlses = [], []
        for part, lse_part in zip(outs, lses, strict=True):
            weight = torch.exp(lse_part - lse.masked_fill(nothing, 0))  # (B, H, S) or (H, total)
            seen = weight.mT[..., None] > 0
            total = torch.zeros_like(lse) if dlse is None else dlse
            if dout is not None:
                dpart = torch.where(seen, dout.to(lse.dtype) * weight.mT[..., None], 0)
                douts.append(dpart.to(part.dtype))
                change = torch.where(seen, part.to(lse.dtype) - out, 0)
                total = total + (dout * change).sum(-1).mT
            else:
                douts.append(None)
            dlses.append(torch.where(weight > 0, weight * total, 0))
        return None, None, *douts, *dlses


def _forward_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _Attention.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_forward(*arguments)


def _merge_autograd(outs: list[Tensor], lses: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*outs, *lses):
        return _Merge.apply(backend, len(outs), *outs, *lses)
    with torch._C._AutoDispatchBelowAutograd():
        return merge_attention(outs, lses, backend)


_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("merge_attention", _merge_autograd, "Autograd")
