"""The paged calls of the Triton backend: launchers with the signatures of attn/paged/call.py, as `Launch`es like those of attention.py.

Work is divided by the call's plan, or without one on the device (division.py); so is that of calls whose terms depend on distances,
since a plan's shared tiles are not for them. The workspaces hold results of parts: float32, head_dim_v + 1 numbers for each part,
row and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..backends import Workers
from ..paged.call import FIXED_SPLIT, AppendCall, PagedCall
from ..paged.checks import QUANTISED, is_set
from . import problem, tuning
from .append import append_kernel, copy_kernel
from .division import LEAST_SPLIT, Batch
from .launch import Launch, options, run
from .paged import paged_kernel, parts_kernel, planned_kernel, planned_parts_kernel
from .pages import Pages, Table
from .problem import UNBOUNDED, row_view, view
from .rope import Rope

NATIVE_FLOAT8 = ("sm_90",)  # architectures that convert float8_e4m3fn themselves


def paged_attention(*arguments: Any) -> None:
    *given, out, lse = arguments
    c = PagedCall._make(given)
    if c.batch == 0 or c.max_seqlen_q == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    table = tuning.table_for(c.q.device)
    by_place = (c.bias, c.distance_bias, c.alibi_slopes, c.row_distance_bias, c.col_distance_bias)
    if c.plan is not None and all(x is None for x in by_place):
        plan, parts = c.plan, partial_results(c, c.plan.shape[0])
        run("planned", arguments, parts, lambda: planned(c, plan, out, lse, parts, table))
    else:
        division = divided(c, table, workers(c.q.device))
        parts = partial_results(c, division.slots)
        run("paged", arguments, parts, lambda: attention(c, out, lse, parts, division, table))


def paged_append(*arguments: Any) -> None:
    run("append", arguments, (), lambda: append(AppendCall._make(arguments)))


def copy_pages(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    of_pages = [x for x in (k_pages, v_pages, k_scales, v_scales) if x is not None and x.shape[0] == k_pages.shape[0]]
    run("copy", (*of_pages, src, dst), (), lambda: [copy(x, src, dst) for x in of_pages])


class Packing(NamedTuple):
    """How query heads lie in a tile."""

    tile: tuning.Config
    heads: int  # of a kv head in one tile
    chunks: int  # tiles for all of them
    rows: int  # of a tile


class Division(NamedTuple):
    packing: Packing
    blocks: int  # of rows of a sequence
    splits: int  # of the keys of a block
    slots: int  # rows of partial results


def workers(device: torch.device) -> int:
    """Programs that keep the device busy and leave little idling at the end."""
    return 4 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2)


def planned_workers(device: torch.device, heads_kv: int) -> Workers:
    """A tile of a plan is for all kv heads, so each is so many programs."""
    return Workers(64, max(1, workers(device) // (4 * heads_kv)))


class PartialResults(NamedTuple):
    out: Tensor  # float32 (slots, Hq, Dv)
    lse: Tensor  # float32 (Hq, slots)


def partial_results(c: PagedCall, slots: int) -> PartialResults:
    heads, dim_v = c.q.shape[1], c.v_pages.shape[3]
    return PartialResults(
        c.q.new_empty((slots, heads, dim_v), dtype=torch.float32), c.q.new_empty((heads, slots), dtype=torch.float32)
    )


def packing(c: PagedCall, tile: tuning.Config) -> Packing:
    group = c.q.shape[1] // c.k_pages.shape[2]
    heads = min(group, tile.block_m)
    return Packing(tile, heads, triton.cdiv(group, heads), tile.block_m // heads)


def divided(c: PagedCall, table: str, workers: int) -> Division:
    pack = packing(c, small_tile(c, table) or large_tile(c, table))
    blocks = triton.cdiv(c.max_seqlen_q, pack.rows)
    if c.batch_invariant:
        splits = triton.cdiv(c.longest, FIXED_SPLIT)
    else:
        programs = c.batch * blocks * c.k_pages.shape[2] * pack.chunks
        splits = min(triton.cdiv(workers, programs), triton.cdiv(c.longest, LEAST_SPLIT.value))
    splits = max(splits, 1)
    return Division(pack, blocks, splits, c.batch * blocks * splits * pack.rows if splits > 1 else 0)


def attention(c: PagedCall, out: Tensor, lse: Tensor, parts: PartialResults, d: Division, table: str) -> list[Launch]:
    shared = _shared(c, d.packing, out, lse, parts)
    blocks = c.batch * d.blocks * c.k_pages.shape[2] * d.packing.chunks
    launches = [
        Launch(
            paged_kernel, blocks * d.splits, (*_reading(c, table), *shared.arguments, d.splits, d.blocks),
            shared.constants | _reading_constants(c, table), options(d.packing.tile),
        )
    ]  # fmt: skip
    if d.splits > 1:
        launches.append(
            Launch(parts_kernel, blocks, (*shared.arguments, d.splits, d.blocks), shared.constants, _merging(shared))
        )
    return launches


def planned(c: PagedCall, plan: Tensor, out: Tensor, lse: Tensor, parts: PartialResults, table: str) -> list[Launch]:
    """As many programs as the plan has rows, whatever it holds: a CUDA graph can keep them."""
    capacity, large = plan.shape[0], packing(c, large_tile(c, table))
    small = small_tile(c, table)
    launches = []
    for pack, of_shared in ((large, True), (packing(c, small) if small else large, False)):
        shared = _shared(c, pack, out, lse, parts)
        launches.append(
            Launch(
                planned_kernel, (capacity - 1) * c.k_pages.shape[2] * pack.chunks,
                (*_reading(c, table), *shared.arguments, plan, capacity, c.batch.bit_length()),
                shared.constants | _reading_constants(c, table) | {"SHARED": of_shared}, options(pack.tile),
            )
        )  # fmt: skip
    _, out_view, lse_view, *parts_and_sink = shared.arguments[:6]
    launches.append(
        Launch(
            planned_parts_kernel, launches[-1].programs,
            (out_view, lse_view, *parts_and_sink, c.q.shape[0], *shared.arguments[-3:], plan, capacity),
            {name: shared.constants[name] for name in ("HEADS", "HEAD_DIM_V", "BLOCK_DV", "BLOCK_M")}, _merging(shared),
        )
    )  # fmt: skip
    return launches


class Shared(NamedTuple):
    """What all kernels of one packing take."""

    arguments: tuple
    constants: dict[str, Any]


def _shared(c: PagedCall, pack: Packing, out: Tensor, lse: Tensor, parts: PartialResults) -> Shared:
    heads_q, heads_kv, dim_v = c.q.shape[1], c.k_pages.shape[2], c.v_pages.shape[3]
    left, right = (UNBOUNDED if x is None else x for x in (c.left, c.right))
    batch = Batch(c.seqlens_k, c.cu_seqlens_q, c.prefix)
    return Shared(
        (batch, view(out), row_view(lse), view(parts.out), row_view(parts.lse), c.sink, left, right, c.q.shape[0], c.max_seqlen_q,
         c.longest if len(c.k_pages) else 0, c.batch, heads_kv * pack.chunks, heads_q // heads_kv, pack.chunks),
        {"TOP_LEFT": c.top_left, "FIXED": FIXED_SPLIT if c.batch_invariant else 0, "HEADS": pack.heads,
         "HEAD_DIM_V": dim_v, "BLOCK_DV": tuning.padded_values(dim_v, c.q.shape[2]), "BLOCK_M": pack.tile.block_m,
         "BLOCK_N": pack.tile.block_n},
    )  # fmt: skip


def _merging(shared: Shared) -> dict[str, int]:
    """Two tiles of float32 fit the registers of so many warps."""
    return {"num_warps": 4 if shared.constants["BLOCK_M"] * shared.constants["BLOCK_DV"] <= 4096 else 16}


def _reading(c: PagedCall, table: str) -> tuple:
    native = tuning.base(table) in NATIVE_FLOAT8
    return (
        view(c.q), pages(c.k_pages, c.k_scales, native), pages(c.v_pages, c.v_scales, native),
        Table(c.block_table, *c.block_table.stride()), rope(c), problem.terms(c), len(c.k_pages),
    )  # fmt: skip


def _reading_constants(c: PagedCall, table: str) -> dict[str, Any]:
    native = tuning.base(table) in NATIVE_FLOAT8
    return _rotation(c) | {
        "PLAIN": problem.plain(problem.terms(c)),
        "FLOAT8": "" if c.k_pages.dtype != torch.float8_e4m3fn else "native" if native else "bits",
        "PAGE_SIZE": c.k_pages.shape[1],
        "HEAD_DIM": c.q.shape[2],
        "BLOCK_D": tuning.padded(c.q.shape[2]),
    }


def append(c: AppendCall) -> list[Launch]:
    return [
        _append_one(c, c.k, c.k_pages, c.k_scales, rope(c), _rotation(c)),
        _append_one(c, c.v, c.v_pages, c.v_scales, None, {"PAIRS": 0, "INTERLEAVED": False}),
    ]


def _append_one(
    c: AppendCall, x: Tensor, x_pages: Tensor, scales: Tensor | None, turn: Rope | None, rotation: dict[str, Any]
) -> Launch:
    tokens, heads, dim = x.shape
    columns = tuning.padded(dim)
    rows = max(1, 2048 // columns)
    batch = c.block_table.shape[0]
    return Launch(
        append_kernel, triton.cdiv(tokens * heads, rows) if c.block_table.numel() else 0,
        (view(x), pages(x_pages, scales), Table(c.block_table, *c.block_table.stride()), c.positions,
         c.cu_seqlens, turn, tokens, heads, batch, batch.bit_length(), c.block_table.shape[1], len(x_pages)),
        rotation | {
            "LARGEST": QUANTISED.get(x_pages.dtype, 0), "FLOAT8": x_pages.dtype == torch.float8_e4m3fn,
            "SET_SCALES": scales is not None and is_set(scales, x_pages), "PAGE_SIZE": x_pages.shape[1],
            "DIM": dim, "ROWS": rows, "COLUMNS": columns,
        },
        {"num_warps": 4},
    )  # fmt: skip


def copy(x: Tensor, src: Tensor, dst: Tensor) -> Launch:
    """Of pages or of their scales, moved as whole numbers of the same width."""
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    bits = bits if x.dim() == 4 else bits[..., None]
    dim, rows = bits.shape[3], bits.shape[1] * bits.shape[2]
    columns = triton.next_power_of_2(max(dim, 1))
    each = max(1, 4096 // columns)
    blocks = triton.cdiv(rows, each)
    return Launch(
        copy_kernel, src.shape[0] * blocks,
        (pages(bits, None), src, dst, rows, bits.shape[2], len(bits), blocks),
        {"DIM": dim, "ROWS": each, "COLUMNS": columns}, {"num_warps": 4},
    )  # fmt: skip


def pages(x: Tensor, scales: Tensor | None, native: bool = False) -> Pages:
    """native: leaves float8_e4m3fn to the card, else as bytes."""
    if x.dtype == torch.float8_e4m3fn and not native:
        x = x.view(torch.uint8)
    strides = (0, 0, 0) if scales is None else (
        0 if n == 1 else stride for n, stride in zip(scales.shape, scales.stride(), strict=True)
    )  # fmt: skip
    return Pages(x, *x.stride()[:3], scales, *strides)


def rope(c: PagedCall | AppendCall) -> Rope | None:
    return None if c.rope_cos is None or len(c.rope_cos) == 0 else Rope(c.rope_cos, c.rope_sin, len(c.rope_cos))


def _rotation(c: PagedCall | AppendCall) -> dict[str, Any]:
    turn = rope(c)
    return {"PAIRS": 0 if turn is None else turn.cos.shape[1], "INTERLEAVED": c.rope_interleaved}


def small_tile(c: PagedCall, table: str) -> tuning.Config | None:
    """Where all rows of a sequence and their heads fill no more. Not where bits must not depend on how many there are."""
    small = tuning.config("paged_decode", table, *_tile_class(c))
    few = c.max_seqlen_q * (c.q.shape[1] // c.k_pages.shape[2]) <= small.block_m
    return small if few and not c.batch_invariant else None


def large_tile(c: PagedCall, table: str) -> tuning.Config:
    kind = "paged" if problem.plain(problem.terms(c)) else "paged_terms"
    return tuning.config(kind, table, *_tile_class(c))


def _tile_class(c: PagedCall) -> tuple[int, int]:
    return 8 * c.q.element_size(), max(c.q.shape[2], c.v_pages.shape[3])
