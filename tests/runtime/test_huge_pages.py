"""The pool's memory on a CPU: asked for in huge pages, given back with its tensor, and plain memory where there are none."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from duplex_attn import PagedKVCache, huge_pages

needs_linux = pytest.mark.skipif(huge_pages.ADVICE is None, reason="huge pages are asked for on Linux")


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split(maxsplit=1)[0]
        if "-" in word and not word.endswith(":"):
            begin, end = (int(part, 16) for part in word.split("-"))
            inside = begin <= address < end
        elif inside and word == "VmFlags:":
            return line.split()[1:]
    return []


def mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@needs_linux
def test_a_pool_is_advised_and_begins_with_a_page() -> None:
    cache = PagedKVCache(2, 900, 16, 4, 32, dtype=torch.bfloat16, quantization="int8")
    for pages in (cache.k_pages, cache.v_pages):
        assert pages.shape == (2, 900, 16, 4, 32) and pages.is_contiguous() and pages.dtype == torch.int8
        assert pages.data_ptr() % huge_pages.HUGE == 0
        assert {"hg"} <= set(flags_at(pages.data_ptr())) and {"hg"} <= set(flags_at(pages[-1, -1, -1, -1].data_ptr()))


@needs_linux
def test_the_whole_tensor_is_there_and_is_given_back() -> None:
    size = 64 << 20
    x = huge_pages.empty(size // 8, dtype=torch.float64, device="cpu")
    x.copy_(torch.arange(size // 8, dtype=torch.float64))
    part = x[-3:]
    del x
    gc.collect()
    assert part.tolist() == [size // 8 - n for n in (3, 2, 1)]
    before = mapped_bytes()
    del part
    gc.collect()
    assert before - mapped_bytes() >= size


class Refused(mmap.mmap):
    def madvise(self, *arguments: Any) -> None:
        raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("way", ["small", "no advice", "refused"])
def test_plain_memory_where_there_are_none(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "no advice":
        monkeypatch.setattr(huge_pages, "ADVICE", None)
    if way == "refused":
        monkeypatch.setattr(mmap, "mmap", Refused)
    x = huge_pages.empty(3, 2 if way == "small" else 1 << 20, dtype=torch.float16, device="cpu")
    x.fill_(1)
    assert x.sum(dtype=torch.float64) == x.numel() and "hg" not in flags_at(x.data_ptr())
