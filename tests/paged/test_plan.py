"""A step's plan: every visible key of every row exactly once, and nothing taken from a plan of something else."""

from __future__ import annotations

import dataclasses

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import Workers
from duplex_attn.paged.functional import plan, plan_capacity
from hypothesis import given, settings
from hypothesis import strategies as st

from ..lanes import Lane, missing
from ..oracle import Call, visible
from .pool import Case, make, rotated

pytestmark = pytest.mark.skipif(not da.backends()["cpu"].available, reason="plans are made by the C++ library")
CPU = Lane("cpu")


def covered(made: torch.Tensor, rows: int, keys: int) -> torch.Tensor:
    """How often each (row, key) is computed, and that each row's results are final once or merged from all its parts."""
    header, *entries = made.tolist()
    tiles, merges = entries[: header[0]], entries[header[0] : header[0] + header[1]]
    count = torch.zeros(rows, keys, dtype=torch.int64)
    parts: dict[int, tuple[int, int, int]] = {}  # slot -> row and keys of the tile
    written = [0] * rows
    for _, first, last, key_begin, key_end, slot, _, _ in tiles:
        count[first:last, key_begin:key_end] += 1
        for row in range(first, last):
            if slot < 0:
                written[row] += 1
            else:
                assert slot + row - first not in parts and slot + row - first < header[2]
                parts[slot + row - first] = (row, key_begin, key_end)
    merged: list[int] = []
    for first, last, shared_slot, shared_count, stride, own_slot, own_count, _ in merges:
        for row in range(first, last):
            slots = [shared_slot + n * stride + row - first for n in range(shared_count)]
            slots += [own_slot + n * (last - first) + row - first for n in range(own_count)]
            assert all(parts[slot][0] == row for slot in slots)
            merged += slots
            written[row] += 1
    assert sorted(merged) == sorted(parts), "a part that no merge reads, or one that two do"
    assert written == [1] * rows
    return count


lengths = st.one_of(st.integers(0, 5), st.integers(0, 900), st.sampled_from([64, 512, 2048, 5000]))
distances = st.one_of(st.none(), st.integers(0, 700))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5),
    st.integers(0, 900), distances, distances, st.booleans(), st.booleans(), st.integers(0, 40), st.sampled_from([1, 16, 48]),
)  # fmt: skip
def test_every_visible_key_once(lens, prefix, left, right, top_left, invariant, shared, page_size) -> None:
    lens_q, lens_k = zip(*lens, strict=True)
    width = max(-(-n // page_size) for n in lens_k) or 1
    table = torch.arange(len(lens) * width, dtype=torch.int32).reshape(-1, width)
    table[:, :shared] = table[0, :shared].clone()
    cu = torch.tensor([0, *lens_q]).cumsum(0).int()
    mask = da.Mask(prefix, left, right, "top_left" if top_left else "bottom_right")
    made = plan(
        table, torch.tensor(lens_k, dtype=torch.int32), page_size, mask, cu_seqlens_q=cu, batch_invariant=invariant
    )
    count = covered(made, int(cu[-1]), max(lens_k, default=0))
    assert count.max() <= 1 if count.numel() else True
    call = Call(torch.empty(0), torch.empty(0), torch.empty(0))
    call.left, call.right, call.top_left, call.prefix = left, right, top_left, prefix
    for b, (len_q, len_k) in enumerate(lens):
        seen = visible(call, b, len_q, len_k)
        assert (count[int(cu[b]) : int(cu[b + 1]), :len_k][seen] == 1).all(), f"sequence {b}"
        assert (count[int(cu[b]) : int(cu[b + 1]), len_k:] == 0).all()
    if invariant:
        for tile in made[1 : 1 + int(made[0, 0])].tolist():
            assert tile[3] // 2048 == max(tile[4] - 1, tile[3]) // 2048, "a part beyond its place counted from key 0"


def test_a_shared_prefix_is_read_once() -> None:
    table = torch.arange(20 * 40, dtype=torch.int32).reshape(20, 40)
    table[:, :32] = table[0, :32].clone()
    made = plan(table, torch.full((20,), 600, dtype=torch.int32), 16)
    shared = [tile for tile in made[1 : 1 + int(made[0, 0])].tolist() if tile[6]]
    assert sorted((t[3], t[4]) for t in shared)[-1][1] == 512 and all(t[1:3] == [0, 20] for t in shared)


def test_few_share_long_prefixes_alone() -> None:
    table = torch.arange(3 * 80, dtype=torch.int32).reshape(3, 80)
    table[:, :72] = table[0, :72].clone()
    for pages, shared in ((63, False), (64, True)):
        own = table.clone()
        own[:, pages:] += 1000 * torch.arange(3, dtype=torch.int32)[:, None]
        made = plan(own, torch.full((3,), 1200, dtype=torch.int32), 16)
        assert bool(made[0, 5] > 0) == shared
    assert plan(table, torch.full((3,), 1200, dtype=torch.int32), 16, workers=Workers(64, 3))[0, 5] == 0


def test_a_plan_of_a_table_whose_columns_lie_apart() -> None:
    """Nine pages in common are too few to be read once; side by side in memory there are twice as many."""
    wide = torch.arange(13 * 128, dtype=torch.int32).reshape(13, 128)
    wide[:, :18] = wide[0, :18].clone()
    table, lengths = wide[:, ::2], torch.full((13,), 900, dtype=torch.int32)
    made = plan(table, lengths, 16)
    assert torch.equal(made, plan(table.contiguous(), lengths, 16)) and made[0, 5] == 0


def test_the_same_numbers_with_a_plan_as_without() -> None:
    pool = make(Case(((1,) * 13, tuple(300 + 40 * n for n in range(13))), (4, 2), (64, 64), shared=288))
    made = plan(pool.block_table, pool.seqlens_k, 16)
    assert made[0, 5] > 0
    with_plan, without = pool.check(CPU, plan=made), pool.run(CPU)
    assert torch.equal(with_plan["out"], without["out"])


@pytest.mark.parametrize("workers", [None, Workers(64, 3), Workers(2, 8)], ids=str)
@pytest.mark.parametrize("mask", [(0, None, 0), (0, 330, 0), (40, 50, 0)], ids=str)
def test_every_backend_follows_any_plan(lane: Lane, mask: tuple, workers: Workers | None) -> None:
    """Of many sequences with a common beginning, decoding and prefilling, with queries behind the last one."""
    lens_q, lens_k = (1, 1, 40, 1, 3) * 3, tuple(400 + 37 * n for n in range(15))
    if lane.slow:
        lens_q, lens_k = (1, 4, 1) * 5, tuple(290 + 11 * n for n in range(15))
    pool = make(Case((lens_q, lens_k), (4, 2), (32, 64), shared=288, mask=mask, sink=True, tail=5))
    made = plan(pool.block_table, pool.seqlens_k, 16, da.Mask(*mask), cu_seqlens_q=pool.cu_seqlens_q, workers=workers)
    assert (made[0, 5] > 0) == (mask == (0, None, 0))
    pool.check(lane, plan=made)
    for term, x in (("alibi_slopes", torch.rand(4)), ("row_distance_bias", torch.randn(15, 4, max(lens_q), 9))):
        biased = dataclasses.replace(pool, packed=dataclasses.replace(pool.packed, **{term: x}))
        with_plan, without = biased.run(lane, plan=made)["out"].clone(), biased.run(lane)["out"]
        torch.testing.assert_close(with_plan, without, msg=f"{term} in a shared tile")


@pytest.mark.parametrize("decodes", [True, False])
def test_rows_of_a_shared_tile_are_rotated_by_their_own_positions(lane: Lane, decodes: bool) -> None:
    lens_q = (1,) * 13 if decodes else (1, 3) * 6 + (2,)
    pool = make(Case((lens_q, tuple(300 + 7 * n for n in range(13))), (2, 1), (32, 32), shared=288))
    made = plan(pool.block_table, pool.seqlens_k, 16, cu_seqlens_q=pool.cu_seqlens_q)
    assert made[0, 5] > 0
    angle = torch.rand(500, 12, generator=torch.Generator().manual_seed(3)) * 6
    given = {"rope_cos": angle.cos(), "rope_sin": angle.sin()}
    ends = pool.cu_seqlens_q.tolist()
    position = torch.cat([torch.arange(k - q, k) for q, k in zip(lens_q, pool.seqlens_k.tolist(), strict=True)])
    assert len(position) == ends[-1]
    turned = dataclasses.replace(pool, q=rotated(pool.q, position, angle.cos(), angle.sin(), False).float())
    want = turned.run(lane)["out"].clone()
    torch.testing.assert_close(pool.run(lane, plan=made, **given)["out"], want, atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(pool.run(lane, **given)["out"], want, atol=3e-6, rtol=3e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 3000)), min_size=1, max_size=12),
    st.booleans(), st.booleans(), st.integers(0, 60), st.sampled_from([(64, 2), (384, 2), (16, 100)]),
)  # fmt: skip
def test_a_fixed_buffer_holds_any_plan(lens, window, invariant, shared, workers) -> None:
    lens_q, lens_k = zip(*((q, max(q, k)) for q, k in lens), strict=True)
    width = max(-(-n // 16) for n in lens_k) or 1
    table = torch.arange(len(lens) * width, dtype=torch.int32).reshape(-1, width)
    table[:, :shared] = table[0, :shared].clone()
    made = plan(
        table, torch.tensor(lens_k, dtype=torch.int32), 16, da.Mask(0, 100 if window else None, 0),
        cu_seqlens_q=torch.tensor([0, *lens_q]).cumsum(0).int(), batch_invariant=invariant, workers=Workers(*workers),
    )  # fmt: skip
    assert len(made) >= made[0, 2], "fewer rows than slots"
    assert len(made) <= plan_capacity(len(lens), sum(lens_q), width * 16, Workers(*workers))


def test_more_parts_than_32_bits_count_are_refused() -> None:
    """2048 of 2^20 rows and more, whose keys lie in pages that are the same."""
    table, rows = torch.zeros(1, 2**14, dtype=torch.int32), 3 * 2**19
    given = {"cu_seqlens_q": torch.tensor([0, rows], dtype=torch.int32), "batch_invariant": True}
    with pytest.raises(ValueError, match=f"^q: expected at most 2147483647 rows .* got {rows * 2048}$"):
        plan(table, torch.tensor([2**22], dtype=torch.int32), 256, da.full(), **given)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
@pytest.mark.parametrize(
    "change", ["longer", "window", "prefix", "invariant", "another table", "damaged", "cut", "uncounted", "parts"]
)
def test_a_plan_of_something_else_is_refused(backend: str, change: str) -> None:
    lane = Lane(backend)
    if reason := missing(lane):
        pytest.skip(reason)
    pool = make(Case(((1,) * 13, (700, *[400] * 12)), (4, 2), (64, 64), shared=288))
    made = plan(pool.block_table, pool.seqlens_k, 16)
    options: dict[str, object] = {"plan": made}
    if change == "longer":
        pool.seqlens_k -= 1
    elif change == "window":
        pool.packed.left = 9
    elif change == "prefix":
        pool.packed.prefix = 5
    elif change == "invariant":
        options["batch_invariant"] = True
    elif change == "another table":
        pool.block_table[12, 3] = pool.block_table[12, 20]  # one of its own
    elif change == "damaged":
        made[1, 4] = 10**6
    elif change == "uncounted":
        made[0, 5] = 0  # of tiles for calls without a bias
    elif change == "parts":
        made[1 + int(made[0, 0])] = torch.tensor([0, 0, 0, 2**31 - 1, 0, 0, 2**31 - 1, 0], dtype=torch.int32)
    else:
        options["plan"] = made[:2].contiguous()
    with pytest.raises(ValueError, match=r"^plan: expected"):
        pool.run(lane, **options)


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"page_size": 0}, ValueError, "page_size"),
        ({"page_size": 16.0}, TypeError, "page_size"),
        ({"block_table": torch.zeros(2, 4)}, TypeError, "block_table"),
        ({"block_table": torch.zeros(8, dtype=torch.int32)}, ValueError, "block_table"),
        ({"block_table": None}, TypeError, "block_table"),
        ({"seqlens_k": torch.tensor([3, 4])}, TypeError, "seqlens_k"),
        ({"seqlens_k": torch.tensor([3], dtype=torch.int32)}, ValueError, "seqlens_k"),
        ({"seqlens_k": torch.tensor([3, 65], dtype=torch.int32)}, ValueError, "seqlens_k"),
        ({"seqlens_k": torch.tensor([3, -1], dtype=torch.int32)}, ValueError, "seqlens_k"),
        ({"cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "cu_seqlens_q"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 1], dtype=torch.int32)}, ValueError, "cu_seqlens_q"),
        ({"mask": da.prefix_lm(torch.tensor([1], dtype=torch.int32))}, ValueError, "prefix"),
    ],
    ids=str,
)
def test_what_no_plan_is_made_of(change: dict[str, object], kind: type[Exception], name: str) -> None:
    given = {
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "seqlens_k": torch.tensor([3, 64]).int(),
        "page_size": 16,
    }
    with pytest.raises(kind, match=rf"^{name}: expected"):
        plan(**(given | change))  # type: ignore[arg-type]
