"""Decoding over pages against what memory gives: the share of a threaded read of the same bytes, and of other layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from .bar import Bench, faster
from .exact import verify

FLOAT32, BFLOAT16, INT8, FLOAT8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
HEAD_DIM, PAGE = 128, 16


@dataclass(frozen=True)
class Pool:
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    seqlens_k: Tensor
    scales: dict[str, Tensor]

    def decode(self) -> Callable[[], Tensor]:
        return partial(
            da.paged_attention, self.q, self.k_pages, self.v_pages, self.block_table, self.seqlens_k, **self.scales
        )

    def read(self) -> Callable[[], object]:
        """torch's sum over the bytes of all pages, as float32."""
        held = [x.view(torch.uint8).view(-1).view(FLOAT32) for x in (self.k_pages, self.v_pages)]
        return lambda: [x.sum() for x in held]

    def verify(self) -> None:
        """Two sequences against float64, over what their pages hold."""
        out = self.decode()()
        for b in {0, len(self.seqlens_k) - 1}:
            n = int(self.seqlens_k[b])
            k, v = (
                self._rows(x, self.scales.get(name), b, n)
                for x, name in ((self.k_pages, "k_scales"), (self.v_pages, "v_scales"))
            )
            verify(out[b][None, None], self.q[b][None, None], k[None], v[None], da.full())

    def _rows(self, pages: Tensor, scales: Tensor | None, b: int, n: int) -> Tensor:
        j = torch.arange(n)
        page, slot = self.block_table[b, j // PAGE].long(), j % PAGE
        if scales is None:
            return pages[page, slot]
        return (pages.view(torch.uint8)[page, slot].view(pages.dtype).float() * scales[page, slot][..., None]).to(
            self.q.dtype
        )


def pool(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, stored: torch.dtype | None = None,
    ordered: bool = False, shared: int = 0,
) -> Pool:  # fmt: skip
    """Sequences in pages of any order, or one after another; the first `shared` keys of all lie in the same pages."""
    g = torch.Generator().manual_seed(0)
    heads_q, heads_kv = heads
    own = [-(-(n - shared) // PAGE) for n in lengths]
    num_pages = sum(own) + shared // PAGE
    order = torch.arange(num_pages) if ordered else torch.randperm(num_pages, generator=g)
    table = torch.zeros(len(lengths), max(own) + shared // PAGE, dtype=torch.int32)
    taken = shared // PAGE
    for b, pages in enumerate(own):
        table[b, : shared // PAGE] = order[: shared // PAGE]
        table[b, shared // PAGE : shared // PAGE + pages] = order[taken : taken + pages]
        taken += pages
    k, v = (torch.randn(num_pages, PAGE, heads_kv, HEAD_DIM, generator=g) for _ in range(2))
    scales = {}
    if stored is not None:
        largest = 127.0 if stored == INT8 else 448.0
        for name, x in (("k_scales", k), ("v_scales", v)):
            scales[name] = x.abs().amax(-1) / largest
            x /= scales[name][..., None]
        k, v = ((x.round() if stored == INT8 else x).to(stored) for x in (k, v))
    else:
        k, v = k.to(dtype), v.to(dtype)
    q = torch.randn(len(lengths), heads_q, HEAD_DIM, generator=g).to(dtype)
    return Pool(q, k, v, table, torch.tensor(lengths, dtype=torch.int32), scales)


LOADS = {
    "8 x 4096": [4096] * 8,
    "1 x 32k": [32768],
    "64 x 1k..8k and one of 64k": [*(1024 + 113 * n for n in range(63)), 65536],
}
OF_READ = [
    ("8 x 4096", (32, 8), FLOAT32, 0.8),
    ("8 x 4096", (32, 8), BFLOAT16, 0.6),
    ("8 x 4096", (8, 8), BFLOAT16, 0.8),
    ("1 x 32k", (8, 8), BFLOAT16, 0.75),
    ("64 x 1k..8k and one of 64k", (8, 8), BFLOAT16, 0.75),
]


def lengths_of(bench: Bench, load: str) -> list[int]:
    return [max(n // 64, 64) for n in LOADS[load][:2]] if bench.tiny else LOADS[load]


@pytest.mark.parametrize(("load", "heads", "dtype", "bar"), OF_READ, ids=str)
def test_share_of_reading(bench: Bench, load: str, heads: tuple[int, int], dtype: torch.dtype, bar: float) -> None:
    """Target: so many times as fast as torch reads the same bytes with all threads."""
    made = pool(lengths_of(bench, load), heads, dtype)
    made.verify()
    name = f"{str(dtype)[6:]} {heads[0]}/{heads[1]} heads, {load}"
    size = made.k_pages.nbytes + made.v_pages.nbytes
    bench.compare("decode, of reading", name, faster(bar), made.decode(), {"read": made.read()}, bytes=size)


@pytest.mark.parametrize("stored", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize(("heads", "bar"), [((8, 8), 1.4), ((32, 8), 1.0)], ids=str)
def test_quantised(bench: Bench, heads: tuple[int, int], bar: float, stored: torch.dtype) -> None:
    lengths = lengths_of(bench, "8 x 4096")
    ours, peer = pool(lengths, heads, BFLOAT16, stored), pool(lengths, heads, BFLOAT16)
    ours.verify()
    name = f"{str(stored)[6:]} {heads[0]}/{heads[1]} heads, 8 x 4096"
    bench.compare("decode, quantised against bfloat16", name, faster(bar), ours.decode(), {"bfloat16": peer.decode()})


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_paging(bench: Bench, dtype: torch.dtype) -> None:
    lengths = lengths_of(bench, "8 x 4096")
    scattered, ordered = pool(lengths, (32, 8), dtype), pool(lengths, (32, 8), dtype, ordered=True)
    scattered.verify()
    name = f"{str(dtype)[6:]} 32/8 heads, pages of 16 in any order"
    bench.compare(
        "decode, against one run of pages", name, faster(0.97), scattered.decode(), {"in order": ordered.decode()}
    )


@pytest.mark.parametrize(("heads", "bar"), [((8, 8), 4.0), ((32, 8), 1.8)], ids=str)
def test_cascade(bench: Bench, heads: tuple[int, int], bar: float) -> None:
    """32 sequences whose first 8192 keys are the same pages, against the same keys in pages that nobody shares."""
    shared, count = (128, 16) if bench.tiny else (8192, 32)
    lengths = [shared + 16 * (n % 8 + 1) for n in range(count)]
    ours = pool(lengths, heads, BFLOAT16, shared=shared)
    # one page of the prefix differs from sequence to sequence: nothing can be shared any more
    apart = ours.block_table.clone()
    apart[:, 0] = apart[:, shared // PAGE]
    ours.verify()
    alone = partial(da.paged_attention, ours.q, ours.k_pages, ours.v_pages, apart, ours.seqlens_k)
    name = f"bfloat16 {heads[0]}/{heads[1]} heads, 32 sequences, 8k shared"
    bench.compare("decode, shared prefix", name, faster(bar), ours.decode(), {"each alone": alone})
