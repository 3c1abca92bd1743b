"""Which blocks of keys a tile visits and who does which tile when: arithmetic on the host, tried exhaustively at small sizes."""

from __future__ import annotations

import ctypes
import itertools
import random

import numpy as np
import pytest
import torch

from .library import compiler, draw, functions, left_out
from .primitives import passed, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
FAR = 2**29


def sees(len_k: int, prefix: int, offset: int, left: int, right: int, rows: range) -> np.ndarray:
    """(rows, len_k), by the definition."""
    j, p = np.arange(len_k)[None, :], np.array(rows)[:, None] + offset
    return (j < prefix) | ((p - left <= j) & (j <= p + right))


def visited(
    len_k: int, prefix: int, offset: int, left: int, right: int, rows: range, block: int
) -> tuple[list[int], int]:
    out, edges = np.zeros(64, np.int32), ctypes.c_int()
    numbers = [ctypes.c_int64(x) for x in (len_k, prefix, offset, left, right, rows.start, rows.stop)]
    count = functions().key_blocks_of(*numbers, block, ctypes.byref(edges), passed(out))
    found = out[:count].tolist()
    in_order, is_edge = np.zeros(64, np.int32), np.zeros(64, np.int32)
    assert functions().key_blocks_in_order(*numbers, block, passed(in_order), passed(is_edge)) == count
    assert in_order[:count].tolist() == sorted(found), "the same blocks, from the first to the last"
    assert set(in_order[:count][is_edge[:count] != 0].tolist()) == set(found[: edges.value]), "the same edges"
    return found, edges.value


def check_span(*span: int, rows: range, block: int) -> None:
    blocks, edges = visited(*span, rows, block)
    mask = sees(*span, rows)
    assert len(set(blocks)) == len(blocks)
    needed = {int(j) // block for j in np.flatnonzero(mask.any(0))}
    assert needed <= set(blocks), "a key that is seen lies in no visited block"
    # Windows of neighbouring rows overlap or touch, so what lies between two seen keys is the only slack there may be.
    if span[3] + span[4] >= 0:
        assert set(blocks) == needed, "a block that no row sees is visited"
    for n, b in enumerate(blocks):
        whole = (b + 1) * block <= span[0] and bool(mask[:, b * block : (b + 1) * block].all())
        assert n < edges or whole, "an inside block hides a key"
        assert n >= edges or not whole or span[1] > 0, "an edge block hides nothing"


def test_every_small_span() -> None:
    block = 4
    for len_k, offset, prefix in itertools.product((0, 1, 7, 8, 13), (-9, -3, 0, 2, 9), (0, 1, 4, 6, 13)):
        for left, right in itertools.product((-2, 0, 1, 5, FAR), (-3, 0, 2, 6, FAR)):
            for rows in (range(0, 1), range(0, 4), range(4, 8), range(6, 9)):
                check_span(len_k, min(prefix, len_k), offset, left, right, rows=rows, block=block)


def test_random_spans() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        len_k, start, block = rng.randrange(0, 60), rng.randrange(0, 40), rng.choice([1, 2, 3, 8, 16])
        left, right = (rng.choice([FAR, rng.randrange(-5, 30)]) for _ in range(2))
        rows = range(start, start + rng.randrange(1, 20))
        check_span(len_k, rng.randrange(0, len_k + 1), rng.randrange(-40, 40), left, right, rows=rows, block=block)


def check_keys(
    len_k: int, prefix: int, offset: int, left: int, right: int, len_q: int, keys: range, block: int
) -> None:
    out, edges = np.zeros(64, np.int32), ctypes.c_int()
    numbers = [ctypes.c_int64(x) for x in (len_k, prefix, offset, left, right, len_q, keys.start, keys.stop)]
    count = functions().row_blocks_of(*numbers, block, ctypes.byref(edges), passed(out))
    blocks, mask = (
        out[:count].tolist(),
        sees(len_k, prefix, offset, left, right, range(len_q))[:, keys.start : keys.stop],
    )
    assert len(set(blocks)) == len(blocks)
    needed = {int(i) // block for i in np.flatnonzero(mask.any(1))}
    assert needed <= set(blocks), "a row that sees a key lies in no visited block"
    if left + right >= 0:
        assert set(blocks) == needed, "a block that sees no key is visited"
    for n, b in enumerate(blocks):
        whole = bool(mask[b * block : (b + 1) * block].all())
        assert (n >= edges.value) == whole, "an inside block hides a key, or an edge block hides nothing"


def test_every_small_span_by_its_keys() -> None:
    for len_k, offset, prefix in itertools.product((1, 7, 8, 13), (-9, -3, 0, 2, 9), (0, 1, 4, 6, 13)):
        for left, right in itertools.product((-2, 0, 1, 5, FAR), (-3, 0, 2, 6, FAR)):
            for len_q, keys in itertools.product((0, 1, 8, 11), (range(0, 1), range(0, 4), range(4, 8), range(6, 9))):
                if keys.stop <= len_k:
                    check_keys(len_k, min(prefix, len_k), offset, left, right, len_q, keys, block=4)


def test_random_spans_by_their_keys() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        len_k, len_q, block = rng.randrange(1, 60), rng.randrange(0, 60), rng.choice([1, 2, 3, 8, 16])
        left, right = (rng.choice([FAR, rng.randrange(-5, 30)]) for _ in range(2))
        start = rng.randrange(len_k)
        keys = range(start, rng.randrange(start, len_k) + 1)
        check_keys(len_k, rng.randrange(len_k + 1), rng.randrange(-40, 40), left, right, len_q, keys, block)


class Lengths(ctypes.Structure):
    """csrc/cuda/lengths.h"""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cu_q", "cu_k", "len_q", "len_k", "start_q", "start_k", "prefix")),
        *((name, ctypes.c_int32) for name in ("batch", "rows_q", "rows_k", "max_q", "max_k", "left", "right")),
        ("top_left", ctypes.c_bool),
    ]


class Entries(ctypes.Structure):
    """csrc/cuda/schedule.h"""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("blocks", "block_m", "block_n")),
        ("keys", ctypes.c_bool),
    ]


def packed(lens_q: list[int], lens_k: list[int], left: int, right: int) -> tuple[Lengths, list[torch.Tensor]]:
    cu = [torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32) for lens in (lens_q, lens_k)]
    lengths = Lengths(
        cu[0].data_ptr(), cu[1].data_ptr(), None, None, None, None, None,
        len(lens_q), sum(lens_q), sum(lens_k), max(lens_q), max(lens_k), left, right, False,
    )  # fmt: skip
    return lengths, cu


def ranked_by(seed: int, lengths: Lengths, entries: Entries) -> list[int]:
    """What the ranking kernel writes: how many entries there are, the tiles taken, the entries; -1 where it writes nothing."""
    order = np.full(2 + entries.blocks * lengths.batch, -1, np.int32)
    draw(seed)
    assert run(functions(), "schedule_of", ctypes.byref(lengths), ctypes.byref(entries), order) is None
    return order.tolist()


@pytest.mark.parametrize(
    ("left", "right", "keys"),
    [(FAR, FAR, False), (FAR, 0, False), (0, FAR, False), (100, 100, False), (FAR, 0, True), (100, 100, True)],
)
def test_entries_are_ranked_longest_first(left: int, right: int, keys: bool) -> None:
    """Of 400 sequences, so that several blocks of the ranking kernel work on them; every block of rows (keys) once, no other."""
    rng = random.Random(left + right)
    lens_q = [rng.choice([0, 1, 64, 65, 500, rng.randrange(900)]) for _ in range(400)]
    lens_k = [rng.choice([0, n, n + 200]) for n in lens_q]
    lengths, kept = packed(lens_q, lens_k, left, right)
    lens, block, other = (lens_k, 128, 64) if keys else (lens_q, 64, 32)
    entries = Entries(-(-max(lens) // block), 64, 128 if keys else 32, keys)
    number, taken, *order = ranked_by(1, lengths, entries)
    real = {b * entries.blocks + n for b, length in enumerate(lens) for n in range(-(-length // block))}
    assert number == len(real) and taken == 0 and set(order[len(real) :]) == {-1}
    ranked = order[: len(real)]
    assert set(ranked) == real
    costs = []
    for entry in ranked:
        b, n = divmod(entry, entries.blocks)
        own = range(block * n, min(block * n + block, lens[b]))
        mask = sees(lens_k[b], 0, lens_k[b] - lens_q[b], left, right, range(lens_q[b]) if keys else own)
        seen = mask[:, own.start : own.stop].any(1) if keys else mask.any(0)
        costs.append(len({int(x) // other for x in np.flatnonzero(seen)}))
    assert costs == sorted(costs, reverse=True)
    assert all(a < b for (a, x), (b, y) in itertools.pairwise(zip(ranked, costs, strict=True)) if x == y), "not stable"


def test_ranking_needs_its_barriers() -> None:
    lengths, kept = packed([500, 64, 900] * 100, [500, 64, 900] * 100, FAR, 0)
    entries = Entries(15, 64, 32, False)
    right = ranked_by(0, lengths, entries)
    assert all(ranked_by(seed, lengths, entries) == right for seed in range(4))
    with left_out("block_sync", ranks=True):
        assert any(ranked_by(seed, lengths, entries) != right for seed in range(4))


def test_sequences_share_no_block_of_what_is_kept_of_rows() -> None:
    rng = random.Random(2)
    for _ in range(200):
        lens = [rng.choice([0, 1, 127, 128, 129, rng.randrange(600)]) for _ in range(rng.randrange(1, 9))]
        lengths, kept = packed(lens, lens, FAR, FAR)
        sums_start_of = functions().sums_start_of
        sums_start_of.restype = ctypes.c_int64
        starts = [sums_start_of(ctypes.byref(lengths), b) for b in range(len(lens) + 1)]
        assert all(start % 128 == 0 for start in starts)
        assert all(next_one - start >= n for n, (start, next_one) in zip(lens, itertools.pairwise(starts), strict=True))


@pytest.mark.parametrize("blocks", [1, 2, 5, 132])
def test_each_tile_is_done_once(blocks: int) -> None:
    for entries, heads, section in itertools.product((1, 3, 40), (1, 4, 6), (1, 2, 4, 6)):
        if section > heads:
            continue
        rounds = -(-entries * heads // blocks)
        tiles = np.zeros(rounds * blocks, np.int64)
        ranks, head = np.zeros(rounds * blocks, np.int32), np.zeros(rounds * blocks, np.int32)
        functions().places_of(entries, heads, section, blocks, ctypes.c_int64(rounds), passed(tiles), passed(ranks), passed(head))  # fmt: skip
        assert sorted(tiles.tolist()) == list(range(rounds * blocks))
        done = [(r, h) for t, r, h in zip(tiles, ranks, head, strict=True) if t < entries * heads]
        assert sorted(done) == list(itertools.product(range(entries), range(heads)))
        in_time = sorted(zip(tiles, ranks, head, strict=True))[: entries * heads]
        ends = [0, *range(heads % section or section, heads + 1, section)]
        for first, end in itertools.pairwise(ends):  # within a section of heads the longest come first
            of_section = [int(r) for _, r, h in in_time if first <= h < end]
            assert of_section == sorted(of_section)
