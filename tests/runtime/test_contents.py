"""Every sequence reads the keys and values that were written for it, whatever happened in between."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch

from .contents import assert_reads_what_was_written, compute

STORED = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16, "head_dim_v": 3},
    {"quantization": "int8"},
    {"quantization": "float8_e4m3fn"},
]
PROMPT = list(range(10))


@pytest.fixture(params=STORED, ids=lambda options: str(next(iter(options.values()))))
def cache(request: pytest.FixtureRequest) -> da.PagedKVCache:
    made = da.PagedKVCache(3, 16, 4, 2, 5, **request.param)
    for pages in (made.k_pages, made.v_pages):
        pages.view(torch.uint8).fill_(0x7F)  # NaN in fp8, large otherwise: nobody may read it
    return made


def test_pages_and_scales_are_stored_as_asked() -> None:
    plain = da.PagedKVCache(3, 16, 4, 2, 5, head_dim_v=7, dtype=torch.float16)
    assert plain.k_pages.shape == (3, 16, 4, 2, 5) and plain.v_pages.shape == (3, 16, 4, 2, 7)
    assert plain.k_pages.dtype == plain.v_pages.dtype == torch.float16
    assert plain.k_scales is None and plain.v_scales is None
    quantised = da.PagedKVCache(3, 16, 4, 2, 5, quantization="float8_e4m3fn")
    assert quantised.k_pages.dtype == torch.float8_e4m3fn
    assert quantised.k_scales is not None and quantised.k_scales.shape == (3, 16, 4, 2)
    assert quantised.v_scales is not None and quantised.v_scales.dtype == torch.float32


def test_prefill_in_chunks_then_decoding(cache: da.PagedKVCache) -> None:
    seq, other = cache.add(PROMPT), cache.add([3] * 5)
    for chunk in (3, 4, 3):
        compute(cache, [seq, other], [chunk, 1])
    for token in (7, 8, 9):
        cache.append([seq, other], [token, token])
        compute(cache, [seq], None)
        assert_reads_what_was_written(cache, seq, other)


def test_forks_part_where_they_write(cache: da.PagedKVCache) -> None:
    seq = cache.add(PROMPT)
    compute(cache, [seq])
    forks = [cache.fork(seq) for _ in range(3)]
    assert all(fork.pages == seq.pages for fork in forks)
    for n, fork in enumerate(forks):
        cache.extend(fork, [n])
    compute(cache, forks)
    cache.extend(seq, [11, 12, 13])
    compute(cache, [seq])
    assert_reads_what_was_written(cache, seq, *forks)
    assert len({s.pages[-2 if s is seq else -1] for s in (seq, *forks)}) == 4
    assert len({s.pages[0] for s in (seq, *forks)}) == 1
    cache.check()


def test_a_fork_of_a_fork_reads_through_a_copy_that_is_still_to_be_made(cache: da.PagedKVCache) -> None:
    first = cache.add(PROMPT)
    compute(cache, [first])
    second = cache.fork(first)
    cache.extend(second, [5])
    cache.truncate(second, 10)  # its last page awaits its content
    third = cache.fork(second)
    cache.extend(third, [6])
    cache.free(first)
    compute(cache, [third])
    assert_reads_what_was_written(cache, second, third)
    cache.check()


def test_a_prefix_that_was_found_is_the_one_that_was_written(cache: da.PagedKVCache) -> None:
    first = cache.add(PROMPT)
    compute(cache, [first])
    cache.free(first)
    second = cache.add([*PROMPT[:9], 3, 3])
    assert second.cached == 8
    batch = compute(cache, [second])
    assert batch.positions.tolist() == [8, 9, 10]
    assert_reads_what_was_written(cache, second)


def test_truncated_and_continued(cache: da.PagedKVCache) -> None:
    seq = cache.add(PROMPT)
    compute(cache, [seq])
    fork = cache.fork(seq)
    for length in (9, 6, 4, 1):  # into shared and indexed pages, and to their borders
        cache.truncate(seq, length)
        cache.extend(seq, [20, 21])
        compute(cache, [seq])
        assert_reads_what_was_written(cache, seq, fork)
        cache.check()


def test_swapped_out_and_in(cache: da.PagedKVCache) -> None:
    seq = cache.add(PROMPT)
    compute(cache, [seq])
    fork = cache.fork(seq)
    cache.extend(fork, [5, 6])  # computed after it came back; and a copy is pending
    cache.swap_out(fork)
    assert fork.swapped and fork.pages == [] and fork.length == 12
    assert cache.stats().swapped == 1 and cache.stats().bytes_swapped > 0
    cache.free(seq)
    flood = cache.add([9] * 64)  # the whole pool: nothing stays where it was
    compute(cache, [flood])
    with pytest.raises(da.OutOfPages):
        cache.swap_in(fork)
    cache.free(flood)
    cache.swap_in(fork)
    assert_reads_what_was_written(cache, fork)
    compute(cache, [fork])
    assert_reads_what_was_written(cache, fork)
    assert cache.stats().bytes_swapped == 0
    cache.check()


def test_what_is_still_there_is_not_brought_back(cache: da.PagedKVCache) -> None:
    seq = cache.add(PROMPT)
    compute(cache, [seq])
    pages = seq.pages
    cache.swap_out(seq)
    cache.swap_in(seq)
    assert seq.pages[:2] == pages[:2]
    assert_reads_what_was_written(cache, seq)
