"""The Triton backend: launchers with the signature that every backend has (attn/call.py).

A call becomes a list of `Launch`es, which the tests also compile ahead of time for cards that are not there. Nothing is
allocated but outputs and the workspaces that `attention_backward` names; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..call import GRADIENTS, Call
from . import problem, tuning
from .backward import delta_kernel, dkdv_kernel, dq_kernel, dsink_kernel
from .bias_backward import dbias_kernel
from .distance_backward import diagonals_kernel, table_kernel
from .forward import forward_kernel
from .launch import Launch, descriptor, options, run
from .merge import merge_kernel
from .problem import plane, row_view, view
from .row_bias_backward import drow_bias_kernel
from .schedule import section


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """out (like q with v's head_dim) and lse, float32 (B, Hq, Sq) or (Hq, total); both contiguous."""
    c = Call._make(arguments)
    *rows, heads, _ = c.q.shape
    out = c.q.new_empty((*rows, heads, c.v.shape[-1]))
    lse = c.q.new_empty((heads, *rows) if c.packed else (rows[0], heads, rows[1]), dtype=torch.float32)
    if c.batch == 0 or c.max_seqlen_q == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    run("forward", c, (out, lse), lambda: [forward(c, out, lse, tuning.table_for(c.q.device))])
    return out, lse


def attention_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of attn/call.py's GRADIENTS: those that `output_mask` wants.

    Workspaces: float32, one number for each of lse and, for the gradient of distance_bias, two for each distance and head.
    """
    *arguments, wanted = rest
    c = Call._make(arguments)
    table = tuning.table_for(c.q.device)
    made = [wanted[0], *[wanted[1] or wanted[2]] * 2, *wanted[3:]]  # k and v share their kernel
    grads = [
        _gradient(name, c) if want and getattr(c, name) is not None else None
        for name, want in zip(GRADIENTS, made, strict=True)
    ]
    delta = torch.empty_like(lse)
    partial = None if grads[4] is None else lse.new_empty(diagonals(c, table).size)
    run(
        "backward", (dout, dlse, out, lse, *c, *made), [x for x in (*grads, delta, partial) if x is not None],
        lambda: backward(c, dout, dlse, out, lse, grads, delta, partial, table),
    )  # fmt: skip
    return tuple(
        grad if grad is not None and want else c.q.new_empty(0, dtype=torch.float32)
        for grad, want in zip(grads, wanted, strict=True)
    )


def _gradient(name: str, c: Call) -> Tensor:
    """To be filled: by zeros where no score is, and in tables by row, whose entries need not all be of a score."""
    x = getattr(c, name)
    has_all = _has_scores(c) and name not in ("row_distance_bias", "col_distance_bias")
    return (x.new_empty if has_all else x.new_zeros)(x.shape)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """outs (B, S, H, D) or (T, H, D) in any strides, lses (B, H, S) or (H, T); the results are contiguous."""
    out, lse = outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
    run("merge", (*outs, *lses), (out, lse), lambda: [merge(outs, lses, out, lse)])
    return out, lse


def forward(c: Call, out: Tensor, lse: Tensor, table: str) -> Launch:
    tile = forward_tile(c, table)
    blocks = triton.cdiv(c.max_seqlen_q, tile.block_m)
    return Launch(
        forward_kernel, c.batch * c.q.shape[-2] * blocks,
        (*_qkv(c), *_descriptors(c, tile, tile.block_n, c.k, c.v), view(out), row_view(lse), c.sink,
         *_shared(c), *_query_heads(c), blocks),
        _constants(c, tile) | {"BEHIND": tile.values_behind}, options(tile),
    )  # fmt: skip


def backward(
    c: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    grads: Sequence[Tensor | None], delta: Tensor, partial: Tensor | None, table: str,
) -> list[Launch]:  # fmt: skip
    """Fills those of `grads` that are there; without a single score the sink's alone, since the others are zero as they come."""
    dq, dk, dv, dbias, ddistance, drow, dcol, dsink = grads
    given = (view(dout), row_view(lse), row_view(delta))
    launches = [delta_of(dout, dlse, out, lse, delta)]
    if _has_scores(c):
        if dq is not None:
            launches.append(dq_of(c, given, dq, table))
        if dk is not None and dv is not None:
            launches.append(dkdv_of(c, given, dk, dv, table))
        if dbias is not None:
            launches.append(dbias_of(c, given, dbias, table))
        if ddistance is not None and partial is not None:
            launches += ddistance_of(c, given, diagonals(c, table), partial, ddistance, table)
        launches += [drow_bias_of(c, given, x, table, of_keys=x is dcol) for x in (drow, dcol) if x is not None]
    if dsink is not None:
        launches.append(dsink_of(c, lse, delta, dsink))
    return launches


def delta_of(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, delta: Tensor) -> Launch:
    batch, rows, heads, head_dim = out.shape if out.dim() == 4 else (1, *out.shape)
    block_d = tuning.padded(head_dim)
    block_m = max(16, 4096 // block_d)
    blocks = triton.cdiv(rows, block_m)
    return Launch(
        delta_kernel, batch * heads * blocks,
        (view(dout), None if dlse is None else row_view(dlse), view(out), row_view(lse), row_view(delta), rows, heads, blocks),
        {"HEAD_DIM_V": head_dim, "BLOCK_M": block_m, "BLOCK_DV": block_d}, {"num_warps": 4},
    )  # fmt: skip


def dq_of(c: Call, given: tuple, dq: Tensor, table: str) -> Launch:
    tile = _tile(_kind("dq", c), c, table)
    blocks = triton.cdiv(c.max_seqlen_q, tile.block_m)
    return Launch(
        dq_kernel, c.batch * c.q.shape[-2] * blocks,
        (*_qkv(c), *_descriptors(c, tile, tile.block_n, c.k, c.v), *given, view(dq), *_shared(c), *_query_heads(c), blocks),
        _constants(c, tile), options(tile),
    )  # fmt: skip


def dkdv_of(c: Call, given: tuple, dk: Tensor, dv: Tensor, table: str) -> Launch:
    tile = _tile(_kind("dkdv", c), c, table)
    blocks = triton.cdiv(c.max_seqlen_k, tile.block_n)
    heads_kv, group = c.k.shape[-2], c.q.shape[-2] // c.k.shape[-2]
    read = c.max_seqlen_q * group * (c.q.shape[-1] + c.v.shape[-1]) * c.q.element_size()
    return Launch(
        dkdv_kernel, c.batch * heads_kv * blocks,
        (*_qkv(c), *_descriptors(c, tile, tile.block_m, c.q, given[0].data), *given, view(dk), view(dv),
         *_shared(c), heads_kv, group, section(c.batch * heads_kv, 1, read), blocks),
        _constants(c, tile), options(tile),
    )  # fmt: skip


def dsink_of(c: Call, lse: Tensor, delta: Tensor, dsink: Tensor) -> Launch:
    batch, rows = (lse.shape[0] if lse.dim() == 3 else 1), lse.shape[-1]
    return Launch(
        dsink_kernel,
        dsink.numel(),
        (row_view(lse), row_view(delta), c.sink, dsink, batch, rows),
        {"ROWS": 1024},
        {"num_warps": 4},
    )


def dbias_of(c: Call, given: tuple, dbias: Tensor, table: str) -> Launch:
    tile = _tile("dbias", c, table)
    heads = c.q.shape[-2]
    blocks = (c.batch, heads, triton.cdiv(c.max_seqlen_q, tile.block_m), triton.cdiv(c.max_seqlen_k, tile.block_n))
    owned = [1 if n == 1 else all_of_them for n, all_of_them in zip(dbias.shape, blocks, strict=True)]
    summed = [all_of_them // own for own, all_of_them in zip(owned, blocks, strict=True)]
    once = {"ONE_ROW": dbias.shape[2] == 1, "ONE_COLUMN": dbias.shape[3] == 1}
    return Launch(
        dbias_kernel, owned[0] * owned[1] * owned[2] * owned[3],
        (*_qkv(c), *given, plane(dbias), *summed, *owned[1:], *_shared(c), heads // c.k.shape[-2]),
        _constants(c, tile) | once, options(tile),
    )  # fmt: skip


def drow_bias_of(c: Call, given: tuple, dbias: Tensor, table: str, *, of_keys: bool) -> Launch:
    tile = _tile("ddistance", c, table)
    heads = c.q.shape[-2]
    blocks = triton.cdiv(c.max_seqlen_k, tile.block_n) if of_keys else triton.cdiv(c.max_seqlen_q, tile.block_m)
    return Launch(
        drow_bias_kernel, c.batch * heads * blocks,
        (*_qkv(c), *given, plane(dbias), dbias.shape[-1] // 2, blocks, *_shared(c), heads, heads // c.k.shape[-2]),
        _constants(c, tile) | {"OF_KEYS": of_keys}, options(tile),
    )  # fmt: skip


class Diagonals(NamedTuple):
    """How the tiles of distances are shared out: `each` sequences to a split, `number` diagonals of tiles from `first` on."""

    tile: tuning.Config
    splits: int
    each: int
    first: int
    number: int
    size: int  # of the workspace


def diagonals(c: Call, table: str) -> Diagonals:
    """Distances j - p(i) lie in [-behind, ahead)."""
    tile = _tile("ddistance", c, table)
    side, heads = tile.block_m, c.q.shape[-2]
    behind, ahead = (c.max_seqlen_q, c.max_seqlen_k) if c.top_left else (c.max_seqlen_k, c.max_seqlen_q)
    first = -triton.cdiv(behind, side)
    number = triton.cdiv(ahead, side) + 1 - first
    # Enough programs to fill a card; the split depends on shapes alone, so the bits do too.
    each = triton.cdiv(c.batch, max(1, min(c.batch, 1024 // (heads * number)))) if c.batch else 1
    splits = triton.cdiv(c.batch, each)
    return Diagonals(tile, splits, each, first, number, splits * heads * 2 * number * side)


def ddistance_of(
    c: Call, given: tuple, plan: Diagonals, partial: Tensor, ddistance: Tensor, table: str
) -> list[Launch]:
    heads, side = c.q.shape[-2], plan.tile.block_m
    constants = {name: x for name, x in _constants(c, plan.tile).items() if name not in ("BLOCK_M", "BLOCK_N")}
    radius, block = ddistance.shape[-1] // 2, 256
    return [
        Launch(
            diagonals_kernel, plan.splits * heads * plan.number,
            (*_qkv(c), *given, partial, plan.number, plan.first, plan.each, *_shared(c), heads, heads // c.k.shape[-2]),
            constants | {"T": side}, options(plan.tile),
        ),
        Launch(
            table_kernel, heads * (2 + triton.cdiv(max(0, 2 * radius - 1), block)),
            (partial, ddistance, plan.splits, plan.number, plan.first, radius, heads),
            {"T": side, "BLOCK": block}, {"num_warps": 4},
        ),
    ]  # fmt: skip


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> Launch:
    batch, rows, heads, head_dim = out.shape if out.dim() == 4 else (1, *out.shape)
    block_d = tuning.padded(head_dim)
    block_m = max(16, 2048 // block_d)
    blocks = triton.cdiv(rows, block_m)
    return Launch(
        merge_kernel, batch * heads * blocks,
        (tuple(map(view, outs)), tuple(map(row_view, lses)), view(out), row_view(lse), rows, heads, blocks),
        {"HEAD_DIM": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d}, {"num_warps": 4},
    )  # fmt: skip


def _has_scores(c: Call) -> bool:
    return c.batch > 0 and c.max_seqlen_q > 0 and c.max_seqlen_k > 0


def forward_tile(c: Call, table: str) -> tuning.Config:
    return _tile(_kind("forward", c), c, table)


def _kind(kernel: str, c: Call) -> str:
    bare = problem.plain(problem.terms(c)) and c.dropout_p == 0
    return kernel if bare else f"{kernel}_terms"


def _tile(kernel: str, c: Call, table: str) -> tuning.Config:
    return tuning.config(kernel, table, 8 * c.q.element_size(), max(c.q.shape[-1], c.v.shape[-1]))


def _qkv(c: Call) -> tuple:
    return view(c.q), view(c.k), view(c.v)


def _descriptors(c: Call, tile: tuning.Config, rows: int, *tensors: Tensor) -> list:
    """Of a tensor as wide as keys, and of one as wide as values."""
    return [descriptor(x, rows, n) if tile.descriptors else None for x, n in zip(tensors, _widths(c), strict=True)]


def _widths(c: Call) -> tuple[int, int]:
    head_dim, head_dim_v = c.q.shape[-1], c.v.shape[-1]
    return tuning.padded(head_dim), tuning.padded_values(head_dim_v, head_dim)


def _shared(c: Call) -> tuple:
    """What every kernel of attention takes after its own tensors."""
    left, right = (problem.UNBOUNDED if x is None else x for x in (c.left, c.right))
    return (
        problem.lengths(c), problem.terms(c), problem.dropout(c), left, right,
        c.q.shape[-3], c.k.shape[-3], c.max_seqlen_q, c.max_seqlen_k, c.batch,
    )  # fmt: skip


def _query_heads(c: Call) -> tuple[int, int, int]:
    """heads, query heads a kv head, and heads a section."""
    heads, group = c.q.shape[-2], c.q.shape[-2] // c.k.shape[-2]
    read = c.max_seqlen_k * (c.k.shape[-1] + c.v.shape[-1]) * c.k.element_size()
    return heads, group, section(c.batch * heads, group, read)


def _constants(c: Call, tile: tuning.Config) -> dict[str, Any]:
    block_d, block_dv = _widths(c)
    return {
        "TOP_LEFT": c.top_left,
        "PLAIN": problem.plain(problem.terms(c)),
        "HEAD_DIM": c.q.shape[-1],
        "HEAD_DIM_V": c.v.shape[-1],
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
