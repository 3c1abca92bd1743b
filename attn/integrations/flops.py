"""FLOPs of the operators for `torch.utils.flop_counter.FlopCounterMode`, counted as torch counts its own attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..call import Call
from ..ops import attention_backward, attention_forward
from ..paged.call import PagedCall
from ..paged.ops import paged_attention


def register() -> None:
    """From here on a FlopCounterMode counts `attention`, `varlen_attention`, their backward and `paged_attention`.

    Two products of every query with every key of its sequence, five in backward whichever gradients are wanted. Padding
    that lengths tell of is not counted; what a mask hides is, as in torch's own formulas. Lengths on a card are read,
    which waits for it, and cannot be done while a CUDA graph is captured.
    """
    for operator, formula in _FORMULAS:
        if operator.overloadpacket not in flop_registry:
            register_flop_formula(operator.overloadpacket, get_raw=True)(formula)


def _forward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    call = Call._make(arguments[: len(Call._fields)])
    return 2 * _pairs(call) * (call.q.shape[-1] + call.v.shape[-1])


def _backward(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    """Scores and their gradient, and the gradients of q, k and v."""
    call = Call._make(arguments[4 : 4 + len(Call._fields)])
    return 2 * _pairs(call) * (3 * call.q.shape[-1] + 2 * call.v.shape[-1])


def _paged(*arguments: Any, out_val: Any = None, **named: Any) -> int:
    call = PagedCall._make(arguments[: len(PagedCall._fields)])
    total, heads, head_dim = call.q.shape
    rows = [1] * call.batch if call.cu_seqlens_q is None else _between(call.cu_seqlens_q, call.max_seqlen_q)
    keys = _numbers(call.seqlens_k, call.longest)
    return 2 * heads * _dot(rows, keys) * (head_dim + call.v_pages.shape[-1])


def _pairs(call: Call) -> int:
    """Of a query and a key of its sequence, over all query heads."""
    batch, heads = call.batch, call.q.shape[-2]
    if call.packed:
        rows, keys = _between(call.cu_seqlens_q, call.max_seqlen_q), _between(call.cu_seqlens_k, call.max_seqlen_k)
    else:
        rows = [call.max_seqlen_q] * batch if call.seqlens_q is None else _numbers(call.seqlens_q, call.max_seqlen_q)
        keys = [call.max_seqlen_k] * batch if call.seqlens_k is None else _numbers(call.seqlens_k, call.max_seqlen_k)
    return heads * _dot(rows, keys)


def _dot(rows: Sequence[int], keys: Sequence[int]) -> int:
    return sum(n * m for n, m in zip(rows, keys, strict=True))


def _numbers(x: Tensor, most: int) -> list[int]:
    """What the tensor holds, or `most` each where it holds nothing."""
    return [most] * x.numel() if isinstance(x, FakeTensor) or x.is_meta else x.tolist()


def _between(cu_seqlens: Tensor | None, most: int) -> list[int]:
    assert cu_seqlens is not None
    return _numbers(torch.diff(cu_seqlens), most)


_FORMULAS = ((attention_forward, _forward), (attention_backward, _backward), (paged_attention, _paged))
