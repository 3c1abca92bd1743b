"""Lengths, pages and the arrays of a step."""

from __future__ import annotations

import duplex_attn as da
import numpy as np
import pytest
import torch
from duplex_attn.backends import Workers


def test_a_sequence_has_the_pages_its_tokens_need(cache: da.PagedKVCache) -> None:
    seq = cache.add([1, 2, 3])
    assert (seq.length, seq.cached, seq.committed, seq.tokens) == (3, 0, 0, [1, 2, 3])
    for more, pages in ((0, 1), (1, 1), (1, 2), (3, 2), (9, 5)):
        cache.extend(seq, more)
        assert len(seq.pages) == pages
    assert seq.tokens == [1, 2, 3] + [-1] * 14
    assert cache.available_pages == 7
    cache.free(seq)
    assert cache.available_pages == 12


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_tokens_come_as_lists_arrays_or_tensors(cache: da.PagedKVCache, dtype: str) -> None:
    ids = [5, 6, 7, 8, 9]
    strided = np.array([ids, ids], dtype).T.copy()[:, 0]
    for tokens in (ids, tuple(ids), strided, torch.from_numpy(strided.copy()), [np.int64(n) for n in ids]):
        seq = cache.add(tokens)
        cache.extend(seq, tokens)
        assert seq.tokens == 2 * ids
        cache.free(seq)


def test_truncate_keeps_what_the_tokens_need(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(10)))
    cache.commit(seq, 10)
    pages = seq.pages
    for length, count in ((9, 3), (8, 2), (5, 2), (1, 1), (0, 0)):
        cache.truncate(seq, length)
        assert (seq.length, seq.committed, seq.tokens) == (length, length, list(range(length)))
        assert seq.pages == pages[:count]
        cache.check()


def test_truncate_keeps_a_bidirectional_prefix(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(10)), bidirectional_prefix=6)
    with pytest.raises(ValueError, match=r"n: expected the bidirectional prefix \(6\) to .* \(10\), got 5"):
        cache.truncate(seq, 5)
    cache.truncate(seq, 6)
    assert seq.length == 6 and seq.bidirectional_prefix == 6


def test_the_last_to_write_into_a_shared_page_keeps_it(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(6)))
    cache.commit(seq, 6)
    forks = [cache.fork(seq), cache.fork(seq)]
    shared = seq.pages[1]
    cache.append([seq, *forks], [1, 2, 3])
    assert [s.pages[1] == shared for s in (seq, *forks)] == [False, False, True]
    assert cache.available_pages == 12 - 4
    assert [s.tokens[-1] for s in (seq, *forks)] == [1, 2, 3]


def test_a_copy_nobody_needs_any_more_is_not_made(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(6)))
    cache.commit(seq, 6)
    fork = cache.fork(seq)
    cache.extend(fork, [1])
    cache.free(seq)
    assert cache.available_pages == 12 - 3  # the source waits for the copy
    cache.free(fork)
    assert not cache._runtime.has_pending_copies and cache.available_pages == 12


def test_batch_arrays(cache: da.PagedKVCache) -> None:
    first, second, third = cache.add(list(range(10))), cache.add([1, 2, 3]), cache.add([])
    cache.commit(second, 2)
    batch = cache.batch([first, second, third], [5, 1, 0])
    assert batch.block_table.tolist() == [[0, 1], [3, 0], [0, 0]]  # of first, 5 tokens: its third page is not read yet
    assert batch.seqlens_k.tolist() == [5, 3, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 5, 6, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2]
    assert (batch.max_seqlen_q, batch.max_seqlen_k, batch.seqs) == (5, 5, (first, second, third))
    assert {x.dtype for x in (batch.block_table, batch.seqlens_k, batch.cu_seqlens_q, batch.positions)} == {torch.int32}
    cache.commit_batch(batch)
    assert (first.committed, second.committed) == (5, 3)
    rest = cache.batch([first, second])
    assert rest.positions.tolist() == [5, 6, 7, 8, 9] and rest.seqlens_k.tolist() == [10, 3]


def test_a_batch_of_nothing(cache: da.PagedKVCache) -> None:
    batch = cache.batch([])
    assert batch.block_table.shape == (0, 0) and batch.cu_seqlens_q.tolist() == [0] and batch.max_seqlen_q == 0
    cache.commit_batch(batch)


def test_a_batch_in_fixed_buffers_pads_them(cache: da.PagedKVCache) -> None:
    buffers = cache.buffers(3, 4, 8)
    assert buffers.positions.tolist() == [-1] * 8 and buffers.cu_seqlens_q.tolist() == [0] * 4
    first, second = cache.add(list(range(6))), cache.add([1, 2])
    for seqs, lengths, positions in (([first, second], [6, 2], [0, 1, 2, 3, 4, 5, 0, 1]), ([second], [2], [0, 1])):
        batch = cache.batch(seqs, out=buffers)
        assert batch.block_table is buffers.block_table and batch.positions is buffers.positions
        assert batch.seqlens_k.tolist() == lengths + [0] * (3 - len(lengths))
        assert batch.positions.tolist() == positions + [-1] * (8 - len(positions))
        assert batch.cu_seqlens_q.tolist()[len(seqs) :] == [sum(lengths)] * (4 - len(seqs))
        assert batch.block_table.shape == (3, 4) and batch.block_table[len(seqs) :].eq(0).all()
        assert batch.block_table[0, : len(seqs[0].pages)].tolist() == seqs[0].pages
    cache.commit_batch(batch)
    assert second.committed == 2 and first.committed == 0


def test_plans_for_a_card_stay_in_the_buffers(cache: da.PagedKVCache) -> None:
    """As a CUDA graph needs them; the division itself is followed in tests/paged."""
    cache._workers = Workers(16, 4)
    buffers = cache.buffers(3, 4, 8)
    kept = []
    for tokens in ([1, 2, 3], [4, 5, 6, 7, 8]):
        batch = cache.batch([cache.add(tokens)], out=buffers)
        made = batch.plan(da.causal())
        assert made is not None and batch.plan(da.causal()) is made
        header, tile = made[:2].tolist()
        assert header[0] == 1 and header[4] == 3 and tile[2] == tile[4] == len(tokens)
        kept.append(made.data_ptr())
        assert batch.plan(da.sliding_window(1, 0)).data_ptr() != kept[0]  # type: ignore[union-attr]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "sizes, room", [((1, 4, 8), "2 sequences"), ((2, 1, 8), "2 pages"), ((2, 4, 7), "8 new tokens")]
)
def test_buffers_too_small(cache: da.PagedKVCache, sizes: tuple[int, int, int], room: str) -> None:
    seqs = [cache.add(list(range(6))), cache.add([1, 2])]
    with pytest.raises(ValueError, match=f"out: expected room for {room}"):
        cache.batch(seqs, out=cache.buffers(*sizes))


def test_stats_tell_pages_waste_and_bytes(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(9)))  # 3 pages, 3 slots unused
    cache.commit(seq, 9)
    fork = cache.fork(seq)
    other = cache.add([1] * 4)
    stats = cache.stats()
    assert (stats.pages_total, stats.pages_used, stats.pages_shared) == (12, 4, 3)
    assert (stats.pages_free, stats.pages_cached, stats.sequences) == (8, 0, 3)
    assert stats.slots_wasted == 3 and stats.waste == pytest.approx(3 / 16)
    assert stats.bytes == 2 * 2 * 12 * 4 * 2 * 8 * 4 and stats.bytes_used == stats.bytes // 3
    cache.truncate(fork, 2)  # seq still uses all of that page
    assert cache.stats().slots_wasted == 3
    for s in (seq, fork, other):
        cache.free(s)
    stats = cache.stats()
    assert (stats.pages_used, stats.pages_cached, stats.pages_free, stats.waste) == (0, 2, 10, 0.0)


def test_handles_may_outlive_their_cache() -> None:
    seq = da.PagedKVCache(1, 4, 4, 1, 1).add([1])
    assert seq.freed
