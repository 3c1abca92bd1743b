"""What the arguments of the paged calls must be; shapes may be symbolic, contents are checked apart."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..checks import (
    check_bias,
    check_device,
    check_heads,
    check_per_head,
    check_per_sequence,
    check_scores,
    check_table,
    check_window,
    wrong_type,
    wrong_value,
)
from .call import MAX_PAGE_SIZE, AppendCall, PagedCall

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest number each holds


def check_attention(call: PagedCall, out: Tensor, lse: Tensor) -> None:
    q, device = call.q, call.q.device
    if q.dtype not in _DTYPES:
        wrong_type("q", "float32, float16 or bfloat16 (float64 in the reference)", q.dtype)
    if q.dim() != 3:
        wrong_value("q", "(total, heads, head_dim)", q.shape)
    _check_pages(call.k_pages, call.v_pages, call.k_scales, call.v_scales, q.dtype, device)
    total, heads, head_dim = q.shape
    check_heads(heads, head_dim, *call.k_pages.shape[1:], *call.v_pages.shape[1:])
    batch = _check_block_table(call.block_table, device)
    check_per_sequence("seqlens_k", call.seqlens_k, batch, device)
    if call.cu_seqlens_q is not None:
        check_per_sequence("cu_seqlens_q", call.cu_seqlens_q, batch + 1, device, "batch + 1")
        if type(call.max_seqlen_q) is int and call.max_seqlen_q < 0:
            wrong_value("max_seqlen_q", "at least 0", call.max_seqlen_q)
    elif total != batch:
        wrong_value("q", f"one token a sequence ({batch}) without cu_seqlens_q", total)
    if call.prefix is not None:
        check_per_sequence("prefix", call.prefix, batch, device)
    check_window(call.left, call.right)
    if call.bias is not None:
        check_bias(call.bias, (batch, heads, call.max_seqlen_q, call.longest), q.dtype, device)
    if call.distance_bias is not None:
        check_table("distance_bias", call.distance_bias, (heads,), device, q.dtype)
    if call.row_distance_bias is not None:
        check_table("row_distance_bias", call.row_distance_bias, (batch, heads, call.max_seqlen_q), device)
    if call.col_distance_bias is not None:
        check_table("col_distance_bias", call.col_distance_bias, (batch, heads, call.longest), device)
    if call.alibi_slopes is not None:
        check_per_head("alibi_slopes", call.alibi_slopes, heads, q.dtype, device)
    if call.sink is not None:
        check_per_head("sink", call.sink, heads, q.dtype, device)
    _check_rope(call.rope_cos, call.rope_sin, head_dim, device)
    check_scores(call.scale, call.softcap)
    if call.plan is not None:
        if call.plan.dtype != torch.int32:
            wrong_type("plan", "int32", call.plan.dtype)
        if call.plan.dim() != 2 or call.plan.shape[1] != 8 or not call.plan.is_contiguous():
            wrong_value("plan", "a contiguous (rows, 8), from PagedKVCache.batch(...).plan", call.plan.shape)
    if out.dtype != q.dtype:
        wrong_type("out", f"q's dtype {q.dtype}", out.dtype)
    check_device("out", out, device)
    if out.shape != (total, heads, call.v_pages.shape[-1]):
        wrong_value("out", f"shape {(total, heads, call.v_pages.shape[-1])}", out.shape)
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        wrong_value("out", "a contiguous last dimension", f"stride {out.stride(-1)}")
    _check_written("out", out)
    if lse.shape != (heads, total) or not lse.is_contiguous():
        wrong_value("lse", f"a contiguous {(heads, total)}", lse.shape)


def check_append(call: AppendCall) -> None:
    k, v = call.k, call.v
    device = k.device
    if k.dtype not in _DTYPES:
        wrong_type("k", "float32, float16 or bfloat16 (float64 in the reference)", k.dtype)
    if v.dtype != k.dtype:
        wrong_type("v", f"k's dtype {k.dtype}", v.dtype)
    check_device("v", v, device)
    _check_pages(call.k_pages, call.v_pages, call.k_scales, call.v_scales, k.dtype, device)
    _check_written("k_pages", call.k_pages)
    _check_written("v_pages", call.v_pages)
    heads = call.k_pages.shape[2]
    if k.dim() != 3 or k.shape[1:] != call.k_pages.shape[2:]:
        wrong_value("k", f"(total, {heads}, {call.k_pages.shape[3]}) as k_pages has it", k.shape)
    total = k.shape[0]
    if v.shape != (total, heads, call.v_pages.shape[3]):
        wrong_value("v", f"shape {(total, heads, call.v_pages.shape[3])}", v.shape)
    batch = _check_block_table(call.block_table, device)
    check_per_sequence("positions", call.positions, total, device, "total")
    if call.cu_seqlens is not None:
        check_per_sequence("cu_seqlens", call.cu_seqlens, batch + 1, device, "batch + 1")
    elif total != batch:
        wrong_value("k", f"one token a sequence ({batch}) without cu_seqlens", total)
    _check_rope(call.rope_cos, call.rope_sin, k.shape[2], device)
    if call.k_pages.dtype in QUANTISED:
        for name, scales in (("k_scales", call.k_scales), ("v_scales", call.v_scales)):
            if scales is None:
                wrong_value(name, f"scales with {call.k_pages.dtype} pages", None)
            if is_set(scales, call.k_pages):
                _check_written(name, scales)


def is_set(scales: Tensor, pages: Tensor) -> bool:
    """Whether appending sets these scales: there is one for each token and head. Others are read."""
    return scales.shape == pages.shape[:3]


def check_copy(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, dst: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    _check_page_shapes(k_pages, v_pages, k_scales, v_scales, k_pages.device)
    _check_written("k_pages", k_pages)
    _check_written("v_pages", v_pages)
    check_per_sequence("src", src, src.numel(), k_pages.device, "n")
    check_per_sequence("dst", dst, src.shape[0], k_pages.device, "n")


def check_plan_tensors(block_table: Tensor, seqlens_k: Tensor, page_size: int, cu_seqlens_q: Tensor | None) -> None:
    """Of what a plan is made from; the operator looks at contents."""
    if not isinstance(page_size, int):
        wrong_type("page_size", "an int", type(page_size).__name__)
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        wrong_value("page_size", f"1 to {MAX_PAGE_SIZE}", page_size)
    device = block_table.device
    batch = _check_block_table(block_table, device)
    check_per_sequence("seqlens_k", seqlens_k, batch, device)
    if cu_seqlens_q is not None:
        check_per_sequence("cu_seqlens_q", cu_seqlens_q, batch + 1, device, "batch + 1")


def on_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the operators that make and check a plan read them."""
    return [None if x is None else x.cpu().contiguous() for x in tensors]


def check_attention_contents(call: PagedCall) -> None:
    """What lengths and tables hold; reads them."""
    lengths = call.seqlens_k
    _check_range("seqlens_k", lengths, 0, call.longest, "a length up to what the block table holds")
    if call.cu_seqlens_q is not None:
        _check_cu("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], call.max_seqlen_q)
    _check_pages_named(call.block_table, lengths, call.k_pages)
    if call.plan is not None and hasattr(torch.ops.duplex_attn_cpu, "check_plan"):
        host = on_host(call.plan, call.block_table, lengths, call.cu_seqlens_q, call.prefix)
        torch.ops.duplex_attn_cpu.check_plan(
            *host, call.k_pages.shape[1], call.left, call.right, call.top_left, call.batch_invariant
        )
    if call.rope_cos is not None and lengths.numel():
        _check_range("seqlens_k", lengths, 0, call.rope_cos.shape[0], "a length up to the positions of rope_cos")


def check_append_contents(call: AppendCall) -> None:
    _check_range("positions", call.positions, -1, call.block_table.shape[1] * call.k_pages.shape[1] - 1,
                 "-1 or a position that the block table holds")  # fmt: skip
    if call.rope_cos is not None:
        _check_range("positions", call.positions, -1, call.rope_cos.shape[0] - 1, "a position of rope_cos")
    total = call.k.shape[0]
    if call.cu_seqlens is not None:
        _check_cu("cu_seqlens", call.cu_seqlens, total, total)
    place = slots(call)
    live = place >= 0
    pages = place[live] // call.k_pages.shape[1]
    if bool(((pages < 0) | (pages >= call.k_pages.shape[0])).any()):
        wrong_value("block_table", f"pages 0 to {call.k_pages.shape[0] - 1} where tokens go", "another")
    if place[live].unique().numel() != int(live.sum()):
        wrong_value("positions", "a slot of its own for each token", "two tokens for one slot")


def check_copy_contents(src: Tensor, dst: Tensor, pages: int) -> None:
    _check_range("src", src, 0, pages - 1, "a page")
    _check_range("dst", dst, 0, pages - 1, "a page")
    if dst.unique().numel() != dst.numel():
        wrong_value("dst", "every page once", "one page twice")
    if bool(torch.isin(src, dst).any()):
        wrong_value("dst", "pages that are not read by the same call", "one of src")


def slots(call: AppendCall) -> Tensor:
    """int64 (total,): the flat slot (page * page_size + offset) of each token, a negative number where it is skipped."""
    page_size = call.k_pages.shape[1]
    tokens = torch.arange(call.k.shape[0], device=call.k.device)
    sequence = tokens
    inside = torch.ones_like(tokens, dtype=torch.bool)
    if call.cu_seqlens is not None:
        sequence = torch.searchsorted(call.cu_seqlens[1:].long(), tokens, right=True)
        inside = sequence < call.block_table.shape[0]
    position = call.positions.long()
    inside &= position >= 0
    if call.block_table.numel() == 0:
        return torch.full_like(tokens, -1)
    row = call.block_table[sequence.clamp(max=call.block_table.shape[0] - 1)].long()
    page = row.gather(1, (position.clamp(min=0) // page_size).clamp(max=row.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside, page * page_size + position % page_size, -1)


def _check_written(name: str, x: Tensor) -> None:
    """That no element of it lies where another does."""
    if 0 in x.stride() and any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True)):
        wrong_value(name, "a place in memory for each element, for they are written", "an expanded tensor")


def _check_pages(
    k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    if k_pages.dtype != dtype and k_pages.dtype not in QUANTISED:
        wrong_type("k_pages", f"{dtype}, int8 or float8_e4m3fn", k_pages.dtype)
    _check_page_shapes(k_pages, v_pages, k_scales, v_scales, device)


def _check_page_shapes(
    k_pages: Tensor, v_pages: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, device: torch.device
) -> None:
    if v_pages.dtype != k_pages.dtype:
        wrong_type("v_pages", f"the dtype of k_pages ({k_pages.dtype})", v_pages.dtype)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_device(name, pages, device)
        if pages.dim() != 4:
            wrong_value(name, "(num_pages, page_size, heads_kv, head_dim)", pages.shape)
        if pages.stride(3) != 1 and pages.shape[3] > 1:
            wrong_value(name, "a contiguous last dimension", f"stride {pages.stride(3)}")
    if v_pages.shape[:3] != k_pages.shape[:3]:
        wrong_value("v_pages", f"k_pages' {tuple(k_pages.shape[:3])} before head_dim", v_pages.shape)
    if not 1 <= k_pages.shape[1] <= MAX_PAGE_SIZE:
        wrong_value("k_pages", f"page_size 1 to {MAX_PAGE_SIZE}", k_pages.shape[1])
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is None:
            continue
        if k_pages.dtype not in QUANTISED:
            wrong_value(name, f"None with {k_pages.dtype} pages", "a tensor")
        if scales.dtype != torch.float32:
            wrong_type(name, "float32", scales.dtype)
        check_device(name, scales, device)
        if scales.dim() != 3 or not all(
            have == 1 or have == full for have, full in zip(scales.shape, k_pages.shape, strict=False)
        ):
            wrong_value(name, f"a shape that broadcasts to {tuple(k_pages.shape[:3])}", scales.shape)


def _check_block_table(block_table: Tensor, device: torch.device) -> int:
    if block_table.dtype != torch.int32:
        wrong_type("block_table", "int32", block_table.dtype)
    check_device("block_table", block_table, device)
    if block_table.dim() != 2:
        wrong_value("block_table", "(batch, max_pages)", block_table.shape)
    return block_table.shape[0]


def _check_rope(cos: Tensor | None, sin: Tensor | None, head_dim: int, device: torch.device) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        wrong_value("rope_cos" if cos is None else "rope_sin", "a tensor as the other is", None)
    for name, x in (("rope_cos", cos), ("rope_sin", sin)):
        if x.dtype != torch.float32:
            wrong_type(name, "float32", x.dtype)
        check_device(name, x, device)
        if x.dim() != 2 or not 1 <= 2 * x.shape[1] <= head_dim or not x.is_contiguous():
            wrong_value(name, f"a contiguous (max_positions, R) with 2R up to head_dim ({head_dim})", x.shape)
    if sin.shape != cos.shape:
        wrong_value("rope_sin", f"the shape of rope_cos {tuple(cos.shape)}", sin.shape)


def _check_range(name: str, x: Tensor, low: int, high: int, expected: str) -> None:
    if x.numel():
        least, most = x.aminmax()
        if int(least) < low or int(most) > high:
            wrong_value(name, f"{expected} ({low} to {high})", int(least) if int(least) < low else int(most))


def _check_cu(name: str, cu: Tensor, rows: int, longest: int) -> None:
    entries = cu.tolist()
    if entries[0] != 0:
        wrong_value(name, "0 first", entries[0])
    if entries[-1] > rows:
        wrong_value(name, f"a last entry up to the rows given ({rows})", entries[-1])
    for before, after in pairwise(entries):
        if after < before:
            wrong_value(name, "entries that never decrease", f"{before} then {after}")
        if after - before > longest:
            wrong_value("max_seqlen_q", f"at least the longest sequence ({after - before})", longest)


def _check_pages_named(block_table: Tensor, lengths: Tensor, k_pages: Tensor) -> None:
    num_pages, page_size = k_pages.shape[:2]
    used = torch.arange(block_table.shape[1], device=lengths.device) * page_size < lengths[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_pages))
    if bool(wrong.any()):
        b, n = torch.nonzero(wrong)[0].tolist()
        wrong_value("block_table", f"pages 0 to {num_pages - 1}", f"{int(block_table[b, n])} at ({b}, {n})")
