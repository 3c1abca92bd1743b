"""The calls of the package: each argument is given its meaning here and handed to the operator, which checks it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from operator import index
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .backends import Explanation, explain_call
from .call import Call
from .checks import MAX_DISTANCE, check_contents, contents_are_readable, wrong_type, wrong_value
from .mask import Mask, full
from .ops import attention_forward as _operator
from .ops import merge_attention as _merge_operator

_FULL = full()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = _FULL,
    *,
    seqlens_q: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    starts_q: Tensor | None = None,
    starts_k: Tensor | None = None,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    row_distance_bias: Tensor | None = None,
    col_distance_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over a dense batch, the softmax of scaled scores and biases over the keys that the mask shows.

    q (B, Sq, Hq, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv): float32, float16 or bfloat16 (float64 in the reference),
    any strides, Hq a multiple of Hkv, D and Dv up to 256.
    seqlens_q, seqlens_k, starts_q, starts_k: int32 (B,), sequence b lies in rows starts[b] .. starts[b] + seqlens[b] of
        its padded tensor; outside, out is 0, lse -inf and gradients 0, whatever the padding holds.
    bias: broadcasts to (B, Hq, Sq, Sk), added to the scores; bool keeps where True. Indexed by stored row and key.
    distance_bias: (Hq, 2R+1), added at clamp(j - p(i), -R, R) + R (T5, Raffel et al. 2020).
    alibi_slopes: (Hq,), subtracts slope * |j - p(i)| (ALiBi, Press et al. 2022); no gradient.
    row_distance_bias, col_distance_bias: (B, Hq, Sq, 2R+1) and (B, Hq, Sk, 2R+1), indexed by i or j and by distance as
        distance_bias is (DeBERTa, He et al. 2021); in any floating dtype, not in the CUDA C++ kernels.
    sink: (Hq,), a logit that takes part in the softmax and has no value (GPT-OSS, 2025).
    scale: of the scores, D ** -0.5 by default. softcap: s -> softcap * tanh(s / softcap) when > 0 (Gemma 2, 2024).
    dropout_p: in [0, 1), of the probabilities. seed: int or int64 tensor (1,); None draws one from torch's generator.
    deterministic: the same gradient bits in every run; None follows torch.use_deterministic_algorithms.
    batch_invariant: a sequence's bits do not depend on the rest of the batch.
    backend: "cpu", "triton", "cuda" or "reference", obeyed or refused with its reason; None chooses (see `explain`).

    Returns out (B, Sq, Hq, Dv), and with return_lse also lse (B, Hq, Sq), the natural log of the softmax's denominator,
    float32; both are differentiable. A row that sees nothing has out 0 and lse -inf.
    Raises ValueError for shapes and values, TypeError for dtypes and kinds, naming the argument.
    """
    arguments = _arguments(
        q, k, v, None, None, None, None, mask, seqlens_q, seqlens_k, starts_q, starts_k, bias,
        distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap, dropout_p, seed,
        deterministic, batch_invariant, backend,
    )  # fmt: skip
    return _run(arguments, return_lse)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    mask: Mask = _FULL,
    *,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    row_distance_bias: Tensor | None = None,
    col_distance_bias: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over sequences packed one after another.

    q (total_q, Hq, D), k (total_k, Hkv, D), v (total_k, Hkv, Dv).
    cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), sequence b holds rows cu_seqlens[b] .. cu_seqlens[b + 1]. They start at
        0 and never decrease; rows past the last entry give 0 and -inf.
    max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths.
    bias broadcasts to (B, Hq, max_seqlen_q, max_seqlen_k), indexed by i and j; row_distance_bias and col_distance_bias
        are (B, Hq, max_seqlen_q, 2R+1) and (B, Hq, max_seqlen_k, 2R+1). All else, and the errors, as in `attention`.

    Returns out (total_q, Hq, Dv), and with return_lse also lse (Hq, total_q).
    """
    check_tensor("cu_seqlens_q", cu_seqlens_q)  # without it the operator would take the call for a dense one
    arguments = _arguments(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask, None, None, None, None, bias,
        distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap, dropout_p, seed,
        deterministic, batch_invariant, backend,
    )  # fmt: skip
    return _run(arguments, return_lse)


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint sets of keys, from the attention over each; exact and differentiable.

    outs: each (B, S, H, D) or (total, H, D); lses: each (B, H, S) or (H, total), float32. Returns out and lse of the
    same shapes. A sink belongs in one part only. Raises ValueError or TypeError, naming the argument.
    """
    return run_operator(_merge_operator, (outs, lses, backend or ""))


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call takes and why each other one does not; the arguments are those of the call.

    A call of `varlen_attention` is told from one of `attention` by its cu_seqlens. Nothing is computed; what the call
    would raise, this raises.
    """
    packed = len(args) > 4 or "cu_seqlens_q" in kwargs or "cu_seqlens_k" in kwargs
    bound = inspect.signature(varlen_attention if packed else attention).bind(*args, **kwargs)
    bound.apply_defaults()
    named = bound.arguments
    if packed:
        check_tensor("cu_seqlens_q", named["cu_seqlens_q"])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # every check of a call, without its kernels
        arguments = _arguments(*[named.get(name) for name in inspect.signature(_arguments).parameters])
        run_operator(_operator, arguments)
    *call_arguments, backend = arguments
    call = Call._make(call_arguments)
    if contents_are_readable(call.q):
        check_contents(call)
    return explain_call(call, backend)


def _arguments(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask, seqlens_q, seqlens_k, starts_q, starts_k,
    bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, scale, softcap, dropout_p, seed,
    deterministic, batch_invariant, backend,
):  # fmt: skip
    """The operator's arguments."""
    if (
        not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor))
        or q.is_nested or k.is_nested or v.is_nested
    ):  # fmt: skip
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x)
    if not ((scale is None or type(scale) is float) and type(softcap) is float and type(dropout_p) is float):
        check_numbers(scale=scale, softcap=softcap, dropout_p=dropout_p)
    if cu_seqlens_q is None:
        max_seqlen_q, max_seqlen_k = _rows(q), _rows(k)
    prefix, left, right, top_left = named_mask(mask)
    if not isinstance(prefix, Tensor):
        prefix = None if prefix == 0 else prefix_tensor(prefix, _sequences(q, cu_seqlens_q), q)
    table_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is not None:
        bias = four_dims(bias)
    distance_bias = table("distance_bias", distance_bias, table_dtype)
    alibi_slopes = table("alibi_slopes", alibi_slopes, table_dtype)
    sink = table("sink", sink, table_dtype)
    if dropout_p == 0:
        seed = None
    elif not isinstance(seed, Tensor):
        seed = _seed_tensor(seed, q)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_q, seqlens_k, starts_q, starts_k,
        prefix, left, right, top_left, bias, distance_bias, alibi_slopes, row_distance_bias,
        col_distance_bias, sink, scale, softcap, dropout_p, seed, deterministic, batch_invariant, backend or "",
    )  # fmt: skip


def _run(arguments: tuple[Any, ...], return_lse: bool) -> Any:
    out, lse = run_operator(_operator, arguments)
    return (out, lse) if return_lse else out


def run_operator(operator: Any, arguments: Sequence[Any]) -> Any:
    try:
        return operator(*arguments)
    except RuntimeError as error:
        _raise_if_wrong_kind(error)
        raise


def _raise_if_wrong_kind(error: RuntimeError) -> None:
    """The dispatcher's complaint about an argument that its schema does not take, in this package's form."""
    found = re.search(r"type '(.*?)' for argument '(\w+)' but instead found type '(.*?)'", str(error))
    if found is not None:
        expected, name, got = found.groups()
        raise TypeError(f"{name}: expected {expected}, got {got}") from None


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        wrong_type(name, "a tensor", type(x).__name__)
    if x.is_nested:
        wrong_type(name, "a strided tensor", "a nested one")


def check_numbers(**arguments: Any) -> None:
    """The dispatcher would read a tensor's number, and its gradient would be lost."""
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            wrong_type(name, "a float", type(x).__name__)


def _rows(x: Tensor) -> int:
    return x.shape[1] if x.dim() > 1 else 0


def _sequences(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    if cu_seqlens_q is not None:
        return max(cu_seqlens_q.numel() - 1, 0)
    return q.shape[0] if q.dim() > 0 else 0


def named_mask(mask: Mask) -> tuple[Any, int | None, int | None, bool]:
    """prefix, left, right, and whether query 0 stands at key 0."""
    if not isinstance(mask, Mask):
        wrong_type("mask", "a Mask (full, causal, prefix_lm, sliding_window)", type(mask).__name__)
    prefix, left, right, align = mask
    if align not in ("bottom_right", "top_left"):
        wrong_value("mask", 'align "bottom_right" or "top_left"', align)
    return prefix, left, right, align == "top_left"


def prefix_tensor(prefix: Any, batch: int, q: Tensor) -> Tensor:
    prefix = _integer("prefix", prefix, "an int or an int32 tensor (batch,)")
    return torch.full((batch,), max(0, min(prefix, MAX_DISTANCE)), dtype=torch.int32, device=q.device)


def four_dims(bias: Tensor) -> Tensor:
    check_tensor("bias", bias)
    return bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias


def table(name: str, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """In the dtype of the softmax; the cast is outside the operator, so autograd casts the gradient back."""
    if x is None:
        return None
    check_tensor(name, x)
    if not x.is_floating_point():
        wrong_type(name, "a floating dtype", x.dtype)
    return x.to(dtype).contiguous()


def _seed_tensor(seed: Any, q: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    seed = _integer("seed", seed, "an int or an int64 tensor (1,)")
    if not -(2**63) <= seed < 2**63:
        wrong_value("seed", "a 64-bit integer", seed)
    return torch.full((1,), seed, dtype=torch.int64, device=q.device)


def _integer(name: str, x: Any, expected: str) -> int:
    """NumPy's integers too; a symbolic one stays so, which `index` would not leave it."""
    if isinstance(x, int | torch.SymInt):
        return cast(int, x)
    try:
        return index(x)
    except TypeError:
        wrong_type(name, expected, type(x).__name__)
