"""Paged calls made to be hard: pages in any order in a pool full of NaN, and the packed call that they stand for."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import duplex_attn as da
import torch
from torch import Tensor

from ..lanes import Lane, on, on_own_stack
from ..oracle import Answer, Call, answer, assert_accurate, floors

QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 1, 1), (37, 1, 130))  # of q, of k
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None  # of the pages; None: dtype
    scales: str = "token"  # or "head", "tensor", "none"
    page_size: int = 16
    shared: int = 0  # leading keys that all sequences have in the same pages
    mask: tuple[int | tuple[int, ...], int | None, int | None] = (0, None, 0)  # prefix, left, right
    top_left: bool = False
    scale: float | None = None
    softcap: float = 0.0
    distance_radius: int | None = None
    alibi: bool = False
    row_col_radius: int | None = None
    bias: str = "none"  # or "full", "keys", "bool"
    sink: bool = False
    strided: bool = False  # heads before slots in memory
    tail: int = 0  # rows of q past the last sequence
    seed: int = 0

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if f.name != "seed" and getattr(self, f.name) != f.default]
        words = [f"{f.name}={getattr(self, f.name)}" for f in changed]
        return f"{self.seed}:" + ",".join(words).replace("torch.", "").replace(" ", "")


TERMS = ("bias", "distance_bias", "alibi_slopes", "row_distance_bias", "col_distance_bias", "sink", "scale", "softcap")


@dataclasses.dataclass
class Pool:
    """The tensors of a paged call."""

    case: Case
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    block_table: Tensor
    seqlens_k: Tensor
    cu_seqlens_q: Tensor
    packed: Call  # the same attention over gathered, dequantised keys

    def run(self, lane: Lane, **options: object) -> Answer:
        """out and lse; out is a window of a storage full of NaN, in which nothing else may be written."""
        case, call = self.case, self.packed
        *rows, dim = (*self.q.shape[:-1], self.v_pages.shape[-1])
        storage = torch.full((rows[0] + 2, rows[1] + 2, dim + 2), math.nan, dtype=case.dtype, device=lane.device)
        out = storage[1:-1, 1:-1, 1:-1]
        given = {name: getattr(call, name) for name in TERMS} | {
            "k_scales": self.k_scales, "v_scales": self.v_scales, "out": out, "return_lse": True,
        }  # fmt: skip
        if not self.decodes:
            longest = int(self.cu_seqlens_q.diff().max()) if len(self.cu_seqlens_q) > 1 else 0
            given |= {"cu_seqlens_q": self.cu_seqlens_q, "max_seqlen_q": longest}

        def there(x: object) -> object:
            return on(x, lane.device) if isinstance(x, Tensor) else x

        mask = da.Mask(there(call.prefix), call.left, call.right, "top_left" if call.top_left else "bottom_right")
        given = {name: there(x) for name, x in (given | options).items()}
        pages = [there(x) for x in (self.q, self.k_pages, self.v_pages, self.block_table, self.seqlens_k)]
        found, lse = on_own_stack(
            lane,
            lambda: da.paged_attention(*pages, mask, **given, backend=lane.backend),
        )
        assert found is out
        inside = torch.zeros(storage.shape, dtype=torch.bool, device=lane.device)
        inside[1:-1, 1:-1, 1:-1] = True
        assert storage[~inside].isnan().all(), "written outside of out"
        return {"out": found.cpu(), "lse": lse.cpu()}

    @property
    def decodes(self) -> bool:
        return set(self.case.lengths[0]) == {1} and not self.case.tail

    def check(self, lane: Lane, what: str = "", **options: object) -> Answer:
        tensors = {n: x for n, x in vars(self).items() if isinstance(x, Tensor)}
        before = {n: bits(x).clone() for n, x in tensors.items()}
        got = self.run(lane, **options)
        for name, x in tensors.items():
            assert torch.equal(bits(x), before[name]), f"{name} was written"
        exact, plain = answers(self.case)
        floor = floors(self.packed, exact)
        if (
            lane.backend == "reference"
        ):  # the same formula as `plain`, in torch's products of other shapes: few rows differ by chance
            floor = {name: 2 * x for name, x in floor.items()}
        assert_accurate(got, exact, plain, floor, what or f"{lane}: {self.case}")
        return got


@cache
def answers(case: Case) -> tuple[Answer, Answer]:
    """The oracle's, and the plain formula's in the case's dtype."""
    packed = make(case).packed
    return answer(packed, torch.float64), answer(packed, case.dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def make(case: Case) -> Pool:
    g = torch.Generator().manual_seed(case.seed)
    lens_q, lens_k = (torch.tensor(lens, dtype=torch.int32) for lens in case.lengths)
    heads_q, heads_kv = case.heads
    stored = case.stored or case.dtype
    batch, page_size = len(lens_k), case.page_size
    table_width = max(int(lens_k.max()) + page_size - 1, 0) // page_size + 1 if batch else 1
    num_pages = batch * table_width + 3
    order = torch.randperm(num_pages, generator=g).int()
    block_table = torch.full((batch, table_width), -(2**30), dtype=torch.int32)
    taken = 0
    for b, length in enumerate(lens_k.tolist()):
        pages = -(-length // page_size)
        block_table[b, :pages] = order[taken : taken + pages]
        taken += pages
        common = case.shared // page_size
        block_table[b, : min(common, pages)] = block_table[0, : min(common, pages)]

    def pages_and_rows(dim: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Pages, scales, and the dequantised keys of all sequences one after another, in float64."""
        values = torch.randn(num_pages, page_size, heads_kv, dim, generator=g)
        scales, worth = None, values.double()
        if stored in QUANTISED:
            shape = {"token": values.shape[:3], "head": (1, 1, heads_kv), "tensor": (1, 1, 1), "none": (1, 1, 1)}
            scales = (
                torch.rand(shape[case.scales], generator=g) * 0.02 + 0.01
                if case.scales != "none"
                else torch.ones(1, 1, 1)
            )
            largest = QUANTISED[stored]
            numbers = (values / scales[..., None]).clamp(-largest, largest)
            numbers = numbers.round() if stored == torch.int8 else numbers
            values = numbers.to(stored)
            worth = values.double() * scales[..., None].double()
        else:
            values = values.to(stored)
            worth = values.double()
        used = torch.zeros(num_pages, page_size, dtype=torch.bool)
        rows = []
        for b, length in enumerate(lens_k.tolist()):
            j = torch.arange(length)
            page, slot = block_table[b, j // page_size].long(), j % page_size
            used[page, slot] = True
            rows.append(worth[page, slot])
        if stored.is_floating_point:
            values.view(torch.uint8)[~used] = 0xFF  # NaN in every format
        if scales is not None and case.scales == "token":
            scales[~used] = math.nan
        if case.strided:
            values = values.transpose(1, 2).contiguous().transpose(1, 2)
            if scales is not None:
                scales = scales.transpose(0, 2).contiguous().transpose(0, 2)
        return values, None if case.scales == "none" else scales, torch.cat(rows) if rows else worth[:0, 0]

    k_pages, k_scales, k = pages_and_rows(case.head_dims[0])
    v_pages, v_scales, v = pages_and_rows(case.head_dims[1])
    cu_q, cu_k = (torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0)) for lens in (lens_q, lens_k))
    total = int(cu_q[-1]) + case.tail
    q = torch.randn(total, heads_q, case.head_dims[0], generator=g).to(case.dtype)
    if case.strided:
        q = q.transpose(0, 1).contiguous().transpose(0, 1)
    prefix, left, right = case.mask
    if isinstance(prefix, tuple):
        prefix = torch.tensor(prefix, dtype=torch.int32)
    call = Call(q, k, v, cu_q, cu_k, prefix=prefix, left=left, right=right, top_left=case.top_left)
    call.scale, call.softcap = case.scale, case.softcap
    if case.distance_radius is not None:
        call.distance_bias = torch.randn(heads_q, 2 * case.distance_radius + 1, generator=g)
    if case.alibi:
        call.alibi_slopes = torch.rand(heads_q, generator=g) / 8
    if case.sink:
        call.sink = torch.randn(heads_q, generator=g)
    longest = int(lens_q.max()) if batch else 0
    if case.row_col_radius is not None:
        width = 2 * case.row_col_radius + 1
        call.row_distance_bias = torch.randn(batch, heads_q, longest, width, generator=g)
        call.col_distance_bias = torch.randn(batch, heads_q, table_width * page_size, width, generator=g).to(case.dtype)
    if case.bias == "full":
        call.bias = torch.randn(batch, heads_q, longest, table_width * page_size, generator=g).to(case.dtype)
    elif case.bias == "keys":
        call.bias = torch.randn(1, heads_q, 1, table_width * page_size, generator=g)
    elif case.bias == "bool":
        call.bias = torch.rand(batch, 1, longest, table_width * page_size, generator=g) < 0.8
    return Pool(case, q, k_pages, v_pages, k_scales, v_scales, block_table, lens_k, cu_q, call)


def rotated(x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pair by pair, in float64."""
    x, reach = x.double().clone(), cos.shape[1]
    for pair in range(reach):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + reach)
        c, s = cos[position, pair].double()[:, None], sin[position, pair].double()[:, None]
        first, second = x[..., a].clone(), x[..., b].clone()
        x[..., a], x[..., b] = first * c - second * s, second * c + first * s
    return x
