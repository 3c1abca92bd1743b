"""What every argument must be. The operators and their fakes call this, so compiled code is checked as eager code is.

TypeError for dtypes and kinds, ValueError for shapes and values, both as "argument: expected what, got what". Shapes
may be symbolic in a fake, which sees no contents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import add, sub
from typing import Any, NoReturn

import torch
from torch import Tensor

from .call import Call

MAX_HEAD_DIM = 256
MAX_DISTANCE = 2**30  # positions and distances add up in 32 bits
CHECK_ON_DEVICE = os.environ.get("DUPLEX_ATTN_CHECK", "0") not in ("", "0")  # contents on a GPU need a device read

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BIAS_DTYPES = (torch.bool, *_DTYPES)
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # as kernels take numbers


def wrong_value(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {_written(got)}")


def wrong_type(name: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{name}: expected {expected}, got {_written(got)}")


def _written(x: object) -> str:
    return str(tuple(x)) if isinstance(x, torch.Size) else str(x)


def check_attention(call: Call) -> None:
    """Everything but contents."""
    (
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlens_q, seqlens_k, starts_q, starts_k,
        prefix, left, right, _, bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink,
        scale, softcap, dropout_p, seed, _, _,
    ) = call  # fmt: skip
    dtype, device = q.dtype, q.device
    if dtype not in _DTYPES:
        wrong_type("q", "float32, float16 or bfloat16 (float64 in the reference)", dtype)
    if k.dtype != dtype:
        wrong_type("k", f"q's dtype {dtype}", k.dtype)
    if v.dtype != dtype:
        wrong_type("v", f"q's dtype {dtype}", v.dtype)
    if k.device != device:
        wrong_value("k", f"q's device {device}", k.device)
    if v.device != device:
        wrong_value("v", f"q's device {device}", v.device)
    if not q.layout == k.layout == v.layout == torch.strided:
        wrong_type("q, k, v", "strided tensors", f"{q.layout}, {k.layout}, {v.layout}")

    if cu_seqlens_q is None and cu_seqlens_k is None:
        batch, heads = _check_dense(q, k, v, max_seqlen_q, max_seqlen_k)
        _check_lengths("q", seqlens_q, starts_q, batch, device)
        _check_lengths("k", seqlens_k, starts_k, batch, device)
    else:
        batch = _check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, device)
        heads = _check_packed(q, k, v)
        if not seqlens_q is seqlens_k is starts_q is starts_k is None:
            wrong_value("seqlens and starts", "None in a packed call", "a tensor")

    if prefix is not None:
        check_per_sequence("prefix", prefix, batch, device)
    check_window(left, right)
    if bias is not None:
        check_bias(bias, (batch, heads, max_seqlen_q, max_seqlen_k), dtype, device)
    if distance_bias is not None:
        check_table("distance_bias", distance_bias, (heads,), device, dtype)
    if row_distance_bias is not None:
        check_table("row_distance_bias", row_distance_bias, (batch, heads, max_seqlen_q), device)
    if col_distance_bias is not None:
        check_table("col_distance_bias", col_distance_bias, (batch, heads, max_seqlen_k), device)
    if alibi_slopes is not None:
        check_per_head("alibi_slopes", alibi_slopes, heads, dtype, device)
    if sink is not None:
        check_per_head("sink", sink, heads, dtype, device)
    check_scores(scale, softcap)
    if dropout_p != 0 or seed is not None:
        _check_dropout(dropout_p, seed, device)


def check_contents(call: Call) -> None:
    """What lengths hold, after `check_attention`; reads them, so only where `contents_are_readable`."""
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        _check_cu_contents("q", call.cu_seqlens_q.tolist(), call.q.shape[0], call.max_seqlen_q)
        if (
            call.cu_seqlens_k is not call.cu_seqlens_q
            or call.k.shape[0] < call.q.shape[0]
            or call.max_seqlen_k < call.max_seqlen_q
        ):
            _check_cu_contents("k", call.cu_seqlens_k.tolist(), call.k.shape[0], call.max_seqlen_k)
    if call.seqlens_q is not None:
        _check_length_contents("q", call.seqlens_q, call.starts_q, call.max_seqlen_q)
    if call.seqlens_k is not None:
        _check_length_contents("k", call.seqlens_k, call.starts_k, call.max_seqlen_k)


def check_gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, call: Call) -> None:
    """What backward takes besides the call."""
    *rows, heads, _ = call.q.shape
    out_shape = (*rows, heads, call.v.shape[-1])
    lse_shape = (heads, *rows) if call.packed else (rows[0], heads, rows[1])
    for name, x, shape, dtype in (
        ("dout", dout, out_shape, call.q.dtype),
        ("dlse", dlse, lse_shape, call.accumulator),
        ("out", out, out_shape, call.q.dtype),
        ("lse", lse, lse_shape, call.accumulator),
    ):
        if x is not None:
            if x.dtype != dtype:
                wrong_type(name, str(dtype), x.dtype)
            check_device(name, x, call.q.device)
            if x.shape != shape:
                wrong_value(name, f"shape {shape}", x.shape)


def check_merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outs:
        wrong_value("outs", "at least one part", "none")
    if len(lses) != len(outs):
        wrong_value("lses", f"as many as outs ({len(outs)})", len(lses))
    first = outs[0]
    if first.dtype not in _DTYPES:
        wrong_type("outs[0]", "float32, float16, bfloat16 or float64", first.dtype)
    if first.dim() not in (3, 4):
        wrong_value("outs[0]", "(batch, seqlen, heads, head_dim) or (total, heads, head_dim)", first.shape)
    *rows, heads, _ = first.shape
    lse_shape = (*rows[:-1], heads, rows[-1])
    lse_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype != first.dtype:
            wrong_type(f"outs[{n}]", f"the dtype of outs[0] ({first.dtype})", out.dtype)
        check_device(f"outs[{n}]", out, first.device, "outs[0]")
        if out.shape != first.shape:
            wrong_value(f"outs[{n}]", f"the shape of outs[0] {tuple(first.shape)}", out.shape)
        if lse.dtype != lse_dtype:
            wrong_type(f"lses[{n}]", str(lse_dtype), lse.dtype)
        check_device(f"lses[{n}]", lse, first.device, "outs[0]")
        if lse.shape != lse_shape:
            wrong_value(f"lses[{n}]", f"shape {lse_shape}", lse.shape)


def read_in_order(call: Any, places: Sequence[int]) -> Any:
    """With the tensors there contiguous: kernels read lengths, ids and tables one behind the other."""
    for n in places:
        x = call[n]
        if x is not None and not x.is_contiguous():
            call = call._replace(**{call._fields[n]: x.contiguous()})
    return call


def contents_are_readable(x: Tensor) -> bool:
    return x.is_cpu or CHECK_ON_DEVICE


def _check_dense(q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, int]:
    """(batch, heads_q)."""
    shape = "(batch, seqlen, heads, head_dim)"
    if q.dim() != 4:
        wrong_value("q", shape, q.shape)
    if k.dim() != 4:
        wrong_value("k", shape, k.shape)
    if v.dim() != 4:
        wrong_value("v", shape, v.shape)
    batch, seqlen_q, heads, head_dim = q.shape
    batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
    batch_v, seqlen_v, heads_v, head_dim_v = v.shape
    if batch_k != batch:
        wrong_value("k", f"q's batch ({batch})", batch_k)
    if batch_v != batch:
        wrong_value("v", f"q's batch ({batch})", batch_v)
    if max_seqlen_q != seqlen_q:
        wrong_value("max_seqlen_q", f"q's seqlen ({seqlen_q}) in a dense call", max_seqlen_q)
    if max_seqlen_k != seqlen_k:
        wrong_value("max_seqlen_k", f"k's seqlen ({seqlen_k}) in a dense call", max_seqlen_k)
    check_heads(heads, head_dim, seqlen_k, heads_kv, head_dim_k, seqlen_v, heads_v, head_dim_v)
    return batch, heads


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> int:
    """heads_q."""
    shape = "(total, heads, head_dim)"
    if q.dim() != 3:
        wrong_value("q", shape, q.shape)
    if k.dim() != 3:
        wrong_value("k", shape, k.shape)
    if v.dim() != 3:
        wrong_value("v", shape, v.shape)
    _, heads, head_dim = q.shape
    check_heads(heads, head_dim, *k.shape, *v.shape)
    return heads


def check_heads(
    heads: int, head_dim: int, rows_k: int, heads_kv: int, head_dim_k: int, rows_v: int, heads_v: int, head_dim_v: int
) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        wrong_value("q", f"head_dim 1 to {MAX_HEAD_DIM}", head_dim)
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        wrong_value("v", f"head_dim 1 to {MAX_HEAD_DIM}", head_dim_v)
    if heads < 1:
        wrong_value("q", "at least one head", heads)
    if heads_kv < 1 or heads % heads_kv:
        wrong_value("k", f"heads_q ({heads}) to be a multiple of heads_kv", heads_kv)
    if head_dim_k != head_dim:
        wrong_value("k", f"q's head_dim ({head_dim})", head_dim_k)
    if heads_v != heads_kv:
        wrong_value("v", f"k's heads ({heads_kv})", heads_v)
    if rows_v != rows_k:
        wrong_value("v", f"k's rows ({rows_k})", rows_v)


def check_window(left: int | None, right: int | None) -> None:
    for name, distance in (("left", left), ("right", right)):
        # A symbolic distance may come from the data: it is checked when the operator runs.
        if type(distance) is int and not -MAX_DISTANCE <= distance <= MAX_DISTANCE:
            wrong_value(name, f"a distance of at most {MAX_DISTANCE} either way, or None for no bound", distance)


def check_scores(scale: float | None, softcap: float) -> None:
    if scale is not None and not -_LARGEST <= scale <= _LARGEST:
        wrong_value("scale", "a finite number (float32)", scale)
    if softcap != 0 and not _SMALLEST <= softcap <= _LARGEST:
        wrong_value("softcap", "0 for none, or a positive finite number (float32)", softcap)


def check_device(name: str, x: Tensor, device: torch.device, whose: str = "q") -> None:
    if x.device != device:
        wrong_value(name, f"{whose}'s device {device}", x.device)


def check_per_sequence(name: str, x: Tensor, count: int, device: torch.device, of: str = "batch") -> None:
    if x.dtype != torch.int32:
        wrong_type(name, "int32", x.dtype)
    check_device(name, x, device)
    if x.dim() != 1 or x.shape[0] != count:
        wrong_value(name, f"shape ({of},) = ({count},)", x.shape)


def _check_lengths(side: str, seqlens: Tensor | None, starts: Tensor | None, batch: int, device: torch.device) -> None:
    if seqlens is not None:
        check_per_sequence(f"seqlens_{side}", seqlens, batch, device)
    if starts is not None:
        check_per_sequence(f"starts_{side}", starts, batch, device)
        if seqlens is None:
            wrong_value(f"seqlens_{side}", f"lengths with starts_{side}", None)


def _check_cu_seqlens(
    cu_q: Tensor | None, cu_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, device: torch.device
) -> int:
    """The batch."""
    if cu_q is None:
        wrong_value("cu_seqlens_q", "a tensor as cu_seqlens_k is", None)
    if cu_k is None:
        wrong_value("cu_seqlens_k", "a tensor as cu_seqlens_q is", None)
    if cu_q.dtype != torch.int32:
        wrong_type("cu_seqlens_q", "int32", cu_q.dtype)
    if cu_k.dtype != torch.int32:
        wrong_type("cu_seqlens_k", "int32", cu_k.dtype)
    check_device("cu_seqlens_q", cu_q, device)
    check_device("cu_seqlens_k", cu_k, device)
    entries = cu_q.shape
    if len(entries) != 1 or entries[0] < 1:
        wrong_value("cu_seqlens_q", "shape (batch + 1,)", entries)
    if cu_k.shape != entries:
        wrong_value("cu_seqlens_k", f"the shape of cu_seqlens_q {tuple(entries)}", cu_k.shape)
    # A symbolic bound may come from the data: it is checked when the operator runs.
    if type(max_seqlen_q) is int and max_seqlen_q < 0:
        wrong_value("max_seqlen_q", "at least 0", max_seqlen_q)
    if type(max_seqlen_k) is int and max_seqlen_k < 0:
        wrong_value("max_seqlen_k", "at least 0", max_seqlen_k)
    return entries[0] - 1


def check_bias(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if bias.dtype not in _BIAS_DTYPES or (bias.dtype == torch.float64 and dtype != torch.float64):
        wrong_type("bias", "bool, float32, float16 or bfloat16 (float64 with float64 q)", bias.dtype)
    check_device("bias", bias, device)
    if bias.dim() != 4 or not all(have == 1 or have == full for have, full in zip(bias.shape, shape, strict=True)):
        wrong_value("bias", f"a shape that broadcasts to {shape}", bias.shape)


def check_table(
    name: str, x: Tensor, leading: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Any floating dtype, or that of the softmax where q's `dtype` is given."""
    if dtype is not None:
        _check_accumulator(name, x, dtype)
    elif x.dtype not in _DTYPES:
        wrong_type(name, "a floating dtype", x.dtype)
    check_device(name, x, device)
    if x.dim() != len(leading) + 1 or x.shape[:-1] != leading or x.shape[-1] % 2 != 1:
        wrong_value(name, f"shape ({', '.join(map(str, leading))}, 2R + 1)", x.shape)


def check_per_head(name: str, x: Tensor, heads: int, dtype: torch.dtype, device: torch.device) -> None:
    _check_accumulator(name, x, dtype)
    check_device(name, x, device)
    if x.shape != (heads,):
        wrong_value(name, f"shape (heads,) = ({heads},)", x.shape)


def _check_accumulator(name: str, x: Tensor, dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    if x.dtype != expected:
        wrong_type(name, str(expected), x.dtype)


def _check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    if not 0 <= dropout_p < 1:
        wrong_value("dropout_p", "0 <= dropout_p < 1", dropout_p)
    if seed is None:
        wrong_value("seed", "an int64 tensor (1,) with dropout", None)
    if seed.dtype != torch.int64:
        wrong_type("seed", "int64", seed.dtype)
    check_device("seed", seed, device)
    if seed.shape != (1,):
        wrong_value("seed", "shape (1,)", seed.shape)


def _check_cu_contents(side: str, cu: list[int], rows: int, bound: int) -> None:
    lengths = list(map(sub, cu[1:], cu))
    if cu[0] != 0:
        wrong_value(f"cu_seqlens_{side}", "0 first", cu[0])
    if lengths and min(lengths) < 0:
        n = next(n for n, length in enumerate(lengths) if length < 0)
        wrong_value(f"cu_seqlens_{side}", "entries that never decrease", f"{cu[n]} then {cu[n + 1]} at {n + 1}")
    if cu[-1] > rows:
        wrong_value(f"cu_seqlens_{side}", f"a last entry up to {side}'s rows ({rows})", cu[-1])
    if lengths and max(lengths) > bound:
        wrong_value(f"max_seqlen_{side}", f"at least the longest sequence ({max(lengths)})", bound)


def _check_length_contents(side: str, seqlens: Tensor, starts: Tensor | None, rows: int) -> None:
    lengths = seqlens.tolist()
    if not lengths:
        return
    if min(lengths) < 0:
        wrong_value(f"seqlens_{side}", "lengths of at least 0", min(lengths))
    if max(lengths) > rows:
        wrong_value(f"seqlens_{side}", f"lengths up to {side}'s seqlen ({rows})", max(lengths))
    if starts is None:
        return
    firsts = starts.tolist()
    if min(firsts) < 0:
        wrong_value(f"starts_{side}", "at least 0", min(firsts))
    if max(map(add, firsts, lengths)) > rows:
        wrong_value(f"starts_{side}", f"start + seqlen up to {side}'s seqlen ({rows})", max(map(add, firsts, lengths)))
