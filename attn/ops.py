"""The torch operators: schemas, implementations, fakes, autograd, autocast and vmap.

Autograd is an implementation on the Autograd key with `torch.autograd.Function`, which costs a fraction of what
`torch.library.register_autograd` does with so many arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import checks
from .backends import check_name, choose, choose_backward, choose_merge
from .call import GRADIENTS, Call

_CALL = """
    Tensor q, Tensor k, Tensor v,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
    Tensor? seqlens_q, Tensor? seqlens_k, Tensor? starts_q, Tensor? starts_k,
    Tensor? prefix, SymInt? left, SymInt? right, bool top_left,
    Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, Tensor? row_distance_bias, Tensor? col_distance_bias,
    Tensor? sink, float? scale, float softcap, float dropout_p, Tensor? seed, bool deterministic, bool batch_invariant
"""
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("duplex_attn", "DEF")
_library.define(f"attention_forward({_CALL}, str backend) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL}, bool[8] output_mask, str backend)"
    f" -> ({', '.join(f'Tensor d{name}' for name in GRADIENTS)})",
    tags=_TAGS,
)
_library.define("merge_attention(Tensor[] outs, Tensor[] lses, str backend) -> (Tensor out, Tensor lse)", tags=_TAGS)
attention_forward = torch.ops.duplex_attn.attention_forward.default
attention_backward = torch.ops.duplex_attn.attention_backward.default
merge_attention = torch.ops.duplex_attn.merge_attention.default

# Places of the arguments of attention_forward: what may need a gradient, and how to take apart what autograd saves.
_DIFFERENTIABLE = [Call._fields.index(name) for name in GRADIENTS]
_TENSORS = [n for n, x in enumerate(attention_forward._schema.arguments) if "Tensor" in str(x.type)]
_OTHERS = [n for n in range(len(Call._fields) + 1) if n not in _TENSORS]
_take_differentiable, _take_tensors, _take_others = map(
    lambda places: itemgetter(*places), (_DIFFERENTIABLE, _TENSORS, _OTHERS)
)
_SAVED = [(_TENSORS + _OTHERS).index(n) for n in range(len(_TENSORS) + len(_OTHERS))]  # where each argument lies then

_IN_ORDER = [Call._fields.index(name) for name in (
    "cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k", "starts_q", "starts_k", "prefix", "distance_bias",
    "alibi_slopes", "sink",
)]  # fmt: skip


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _checked_call(arguments[:-1])
    return choose(call, arguments[-1]).attention_forward(*call)


def _backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call_arguments, output_mask, backend = rest
    call = _checked_call(call_arguments)
    checks.check_gradients(dout, dlse, out, lse, call)
    dout = dout if _has_contiguous_rows(dout) else dout.contiguous()
    out = out if _has_contiguous_rows(out) else out.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()  # kernels lay out what they keep for a row as lse
    chosen = choose_backward(call, backend)
    return tuple(chosen.attention_backward(dout, dlse, out, lse, *call, output_mask))


def _checked_call(arguments: Sequence[Any]) -> Call:
    call = Call._make(arguments)
    checks.check_attention(call)
    if checks.contents_are_readable(call.q):
        checks.check_contents(call)
    call = checks.read_in_order(call, _IN_ORDER)
    q, k, v = call[:3]
    if not (_has_contiguous_rows(q) and _has_contiguous_rows(k) and _has_contiguous_rows(v)):
        q, k, v = (x if _has_contiguous_rows(x) else x.contiguous() for x in (q, k, v))
        call = call._replace(q=q, k=k, v=v)
    return call


def _has_contiguous_rows(x: Tensor) -> bool:
    return x.is_contiguous() or x.stride(-1) == 1


def _merge(outs: list[Tensor], lses: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    checks.check_merge(outs, lses)
    return choose_merge(outs, backend).merge_attention(outs, lses)


for _name, _implementation in (
    ("attention_forward", _forward),
    ("attention_backward", _backward),
    ("merge_attention", _merge),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("duplex_attn::attention_forward", lib=_library)
def _(*arguments):
    call = _checked_fake(arguments[:-1], arguments[-1])
    *rows, heads, _ = call.q.shape
    lse_shape = (heads, *rows) if call.cu_seqlens_q is not None else (rows[0], heads, rows[1])
    return call.q.new_empty(*rows, heads, call.v.shape[-1]), call.q.new_empty(lse_shape, dtype=call.accumulator)


@torch.library.register_fake("duplex_attn::attention_backward", lib=_library)
def _(dout, dlse, out, lse, *rest):
    *call_arguments, output_mask, backend = rest
    call = _checked_fake(call_arguments, backend)
    checks.check_gradients(dout, dlse, out, lse, call)
    inputs = _take_differentiable(call)
    return tuple(
        x.new_empty(x.shape) if want and x is not None else call.q.new_empty(0, dtype=torch.float32)
        for x, want in zip(inputs, output_mask, strict=True)
    )


@torch.library.register_fake("duplex_attn::merge_attention", lib=_library)
def _(outs, lses, backend):
    checks.check_merge(outs, lses)
    check_name(backend)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _checked_fake(arguments: Sequence[Any], backend: str) -> Call:
    call = Call._make(arguments)
    checks.check_attention(call)
    check_name(backend)
    return call


# The Autograd key is handed the keys still to come. Where only the device's own are left, there is no mode, fake or
# functorch layer underneath and the implementation is called directly, which saves a second way through the dispatcher.
_PLAIN = (
    DispatchKeySet(DispatchKey.CPU) | DispatchKeySet(DispatchKey.AutogradCPU),
    DispatchKeySet(DispatchKey.CUDA) | DispatchKeySet(DispatchKey.AutogradCUDA),
)
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled
_functorch_is_active = torch._C._are_functorch_transforms_active


def _run(operator: Any, implementation: Any, keyset: DispatchKeySet, arguments: Sequence[Any]) -> Any:
    with _below_autograd():
        return implementation(*arguments) if keyset in _PLAIN else operator(*arguments)


def _is_differentiated(tensors: Sequence[Any]) -> bool:
    return (_is_grad_enabled() and _any_requires_grad(*tensors)) or forward_ad._current_level >= 0


def _record(function: type[_Operation], keyset: DispatchKeySet, *arguments: Any) -> Any:
    """`function.apply`, less what it does for functions that are not kernels of the Autograd key already."""
    if keyset in _PLAIN:
        return super(torch.autograd.Function, function).apply(keyset, *arguments)  # type: ignore[misc]
    if not _functorch_is_active():
        return function.apply(keyset, *arguments)
    with enable_single_level_autograd_function():  # this key belongs to a layer of torch.func.grad
        return super(torch.autograd.Function, function).apply(keyset, *arguments)  # type: ignore[misc]


class _Operation(torch.autograd.Function):
    @staticmethod
    def run(operator: Any, implementation: Any, keyset: DispatchKeySet, arguments: Sequence[Any]) -> Any:
        if _functorch_is_active():
            with torch.enable_grad():  # the layers underneath record for themselves
                return _run(operator, implementation, keyset, arguments)
        return _run(operator, implementation, keyset, arguments)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError("duplex_attn: there are no forward-mode derivatives; use reverse mode")


class _Attention(_Operation):
    @staticmethod
    def forward(ctx, keyset, *arguments):
        out, lse = _Operation.run(attention_forward, _forward, keyset, arguments)
        ctx.save_for_backward(out, lse, *_take_tensors(arguments))
        ctx.others = _take_others(arguments)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(wanted)
        if dout is None and dlse is None:
            return tuple(grads)
        out, lse, *tensors = ctx.saved_tensors
        saved = (*tensors, *ctx.others)
        *call, backend = [saved[n] for n in _SAVED]  # compiled autograd traces this, and knows no itemgetter
        dout = torch.zeros_like(out) if dout is None else dout
        output_mask = [wanted[n + 1] for n in _DIFFERENTIABLE]
        results = attention_backward(dout, dlse, out, lse, *call, output_mask, backend)
        for n, want, result in zip(_DIFFERENTIABLE, output_mask, results, strict=True):
            grads[n + 1] = result if want else None
        return tuple(grads)


class _AttentionBackward(_Operation):
    @staticmethod
    def forward(ctx, keyset, *arguments):
        return _Operation.run(attention_backward, _backward, keyset, arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("duplex_attn: attention has no second derivatives; differentiate it once")


class _MergeAttention(_Operation):
    @staticmethod
    def forward(ctx, keyset, backend, parts, *outs_then_lses):
        arguments = (outs_then_lses[:parts], outs_then_lses[parts:], backend)
        out, lse = _Operation.run(merge_attention, _merge, keyset, arguments)
        ctx.save_for_backward(out, lse, *outs_then_lses)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        """With weights w = exp(lse_part - lse): dout_part = w dout, dlse_part = w (<dout, out_part - out> + dlse)."""
        out, lse, *outs_then_lses = ctx.saved_tensors
        parts = len(outs_then_lses) // 2
        finite_lse = lse.masked_fill(lse == -torch.inf, 0)
        douts, dlses = [], []
        for out_part, lse_part in zip(outs_then_lses[:parts], outs_then_lses[parts:], strict=True):
            weight = torch.exp(lse_part - finite_lse)
            change = 0 if dlse is None else dlse
            if dout is not None:
                column = weight.mT[..., None]  # (B, S, H, 1) or (total, H, 1)
                douts.append((column * dout).to(out_part.dtype))
                away = torch.where(column > 0, out_part.to(lse.dtype) - out, 0)
                change = change + (dout * away).sum(-1).mT
            dlses.append(torch.where(weight > 0, weight * change, 0))
        return None, None, None, *(douts or [None] * parts), *dlses


def _forward_autograd(keyset: DispatchKeySet, *arguments: Any) -> tuple[Tensor, Tensor]:
    if _is_differentiated(_take_differentiable(arguments)):
        return _record(_Attention, keyset, *arguments)
    return _run(attention_forward, _forward, keyset, arguments)


def _backward_autograd(keyset: DispatchKeySet, *arguments: Any) -> tuple[Tensor, ...]:
    if _is_differentiated(arguments):
        return _record(_AttentionBackward, keyset, *arguments)
    return _run(attention_backward, _backward, keyset, arguments)


def _merge_autograd(
    keyset: DispatchKeySet, outs: list[Tensor], lses: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    if _is_differentiated((*outs, *lses)):
        return _record(_MergeAttention, keyset, backend, len(outs), *outs, *lses)
    return _run(merge_attention, _merge, keyset, (outs, lses, backend))


_library.impl("attention_forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("attention_backward", _backward_autograd, "Autograd", with_keyset=True)
_library.impl("merge_attention", _merge_autograd, "Autograd", with_keyset=True)


def _forward_autocast(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Casts q, k, v as autocast does for torch's own attention, and nothing else."""
    device_type = arguments[0].device.type
    dtype = torch.get_autocast_dtype(device_type)
    qkv = [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in arguments[:3]]
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return attention_forward(*qkv, *arguments[3:])


_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
_library.impl("attention_forward", _forward_autocast, "AutocastCPU")
_library.impl("attention_forward", _forward_autocast, "AutocastCUDA")


def _fold(x: Tensor, dim: int | None, size: int, like: int | None = None) -> Tensor:
    """(V, B, ...) with V at `dim`, or (B, ...) without V, as (V * B, ...); `like` is the B to expand a 1 to."""
    x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
    if like is not None and x.shape[1] != like:
        x = x.expand(size, like, *x.shape[2:])
    return x.flatten(0, 1)


def _batch_of(x: Tensor, dim: int | None) -> int:
    """B of (B, ...) with V at `dim`, or without V."""
    return x.shape[0 if dim != 0 else 1]


def _fold_call(info: Any, in_dims: Sequence[int | None], call: Call, separate_bias: bool) -> Call:
    """The call with vmap's dimension in front of the batch; `separate_bias` gives each sample a bias of its own."""
    dims = dict(zip(Call._fields, in_dims, strict=True))
    if call.packed:
        checks.wrong_value("vmap", "a dense call", "a packed one")
    for name in ("distance_bias", "alibi_slopes", "sink"):
        if dims[name] is not None:
            checks.wrong_value(name, "the same for every sample of vmap", "one for each")
    if call.dropout_p > 0 and info.randomness != "different":
        checks.wrong_value("dropout_p", "0 under vmap unless randomness='different'", call.dropout_p)
    size = info.batch_size
    batch = _batch_of(call.q, dims["q"])
    folded: dict[str, Any] = {
        name: _fold(x, dims[name], size)
        for name, x in call._asdict().items()
        if name in _PER_SEQUENCE and x is not None
    }
    if call.bias is not None and (separate_bias or dims["bias"] is not None or call.bias.shape[0] != 1):
        folded["bias"] = _fold(call.bias, dims["bias"], size, like=batch)
    if call.seed is not None and dims["seed"] is not None:
        folded["seed"] = call.seed.select(dims["seed"], 0)  # one is enough: the counters differ with the batch
    return call._replace(**folded)


_PER_SEQUENCE = ("q", "k", "v", "seqlens_q", "seqlens_k", "starts_q", "starts_k", "prefix",
                 "row_distance_bias", "col_distance_bias")  # fmt: skip


@torch.library.register_vmap("duplex_attn::attention_forward", lib=_library)
def _(info, in_dims, *arguments):
    call = _fold_call(info, in_dims[:-1], Call._make(arguments[:-1]), separate_bias=False)
    outputs = attention_forward(*call, arguments[-1])
    size, batch = info.batch_size, _batch_of(arguments[0], in_dims[0])
    return tuple(x.unflatten(0, (size, batch)) for x in outputs), (0, 0)


@torch.library.register_vmap("duplex_attn::attention_backward", lib=_library)
def _(info, in_dims, dout, dlse, out, lse, *rest):
    *call_arguments, output_mask, backend = rest
    wanted = dict(zip(GRADIENTS, output_mask, strict=True))
    for name in ("distance_bias", "sink"):
        if wanted[name]:
            checks.wrong_value(name, "no gradient under vmap, which folds into the batch", "one that requires it")
    size, batch = info.batch_size, _batch_of(dout, in_dims[0])
    call = _fold_call(info, in_dims[4:-2], Call._make(call_arguments), separate_bias=wanted["bias"])
    given = [
        None if x is None else _fold(x, dim, size) for x, dim in zip((dout, dlse, out, lse), in_dims, strict=False)
    ]
    grads = dict(zip(GRADIENTS, attention_backward(*given, *call, output_mask, backend), strict=True))
    for name in GRADIENTS:
        if wanted[name]:
            grads[name] = grads[name].unflatten(0, (size, batch))
    if wanted["bias"]:
        bias_dim = in_dims[4 + Call._fields.index("bias")]
        if rest[Call._fields.index("bias")].shape[0 if bias_dim != 0 else 1] == 1:
            grads["bias"] = grads["bias"].sum(1, keepdim=True)
    return tuple(grads.values()), tuple(0 if want else None for want in output_mask)


@torch.library.register_vmap("duplex_attn::merge_attention", lib=_library)
def _(info, in_dims, outs, lses, backend):
    out_dims, lse_dims, _ = in_dims
    if outs[0].dim() - (out_dims[0] is not None) != 4:
        checks.wrong_value("vmap", "dense parts", "packed ones")
    size, batch = info.batch_size, _batch_of(outs[0], out_dims[0])
    outs = [_fold(x, dim, size) for x, dim in zip(outs, out_dims, strict=True)]
    lses = [_fold(x, dim, size) for x, dim in zip(lses, lse_dims, strict=True)]
    return tuple(x.unflatten(0, (size, batch)) for x in merge_attention(outs, lses, backend)), (0, 0)
