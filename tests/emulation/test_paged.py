"""The paged calls and the merge of the CUDA kernels, emulated: what other backends are tested by, and the orders of events."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import Workers
from duplex_attn.paged.functional import plan

from ..lanes import Lane
from ..paged import test_append as append
from ..paged import test_attention as attention
from ..paged.pool import Case, Pool, make, rotated
from .library import CARDS, EMULATED, draw, left_out

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
BF16, FP16 = torch.bfloat16, torch.float16
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
OWN_LANE = True  # tests that are taken from elsewhere run on it alone


@pytest.fixture
def card() -> int:
    return CARDS["sm90"]


ON_EACH_CARD = pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))


@pytest.fixture
def lane(emulated: Lane, card: int) -> Iterator[Lane]:
    draw(0, processors=3)
    with EMULATED.on(card):
        yield emulated


def fitting(case: Case) -> Case:
    """The nearest case that the kernels take."""
    multiple = 8 if case.stored is None else 16
    return dataclasses.replace(
        case,
        dtype=BF16 if case.dtype == torch.float32 else case.dtype,
        head_dims=tuple(-(-d // multiple) * multiple for d in case.head_dims),
        row_col_radius=None,
        bias="none",
    )


@pytest.mark.parametrize(
    ("card", "case"),
    [(list(CARDS.values())[n % 2], case) for n, case in enumerate(attention.cases(60, seed=0))],
    ids=str,
)
def test_call(lane: Lane, case: Case) -> None:
    draw(case.seed, processors=1 + case.seed % 5)
    make(fitting(case)).check(lane)


CAUSAL, WINDOW, PREFIX_AND_WINDOW = (0, None, 0), (0, 200, 0), (40, 50, 0)


@ON_EACH_CARD
@pytest.mark.parametrize(
    ("heads", "stored", "mask", "workers"),
    [
        ((2, 2), None, CAUSAL, Workers(64, 3)),
        ((8, 2), INT8, CAUSAL, Workers(2, 8)),
        ((8, 1), FLOAT8, WINDOW, Workers(64, 3)),
        ((4, 2), None, (0, 150, 0), Workers(128, 3)),
        ((40, 2), None, CAUSAL, Workers(64, 3)),
        ((4, 2), FLOAT8, PREFIX_AND_WINDOW, Workers(2, 8)),
    ],
    ids=str,
)
def test_a_plan(lane: Lane, heads: tuple[int, int], stored: torch.dtype | None, mask: tuple, workers: Workers) -> None:
    """Decoding and prefilling together, with rows behind the last sequence; more heads than a tile has rows."""
    lens_q, lens_k = (1, 1, 9, 1, 3) * 3, tuple(290 + 11 * n for n in range(15))
    pool = make(Case((lens_q, lens_k), heads, (32, 64), BF16, stored, shared=288, mask=mask, sink=True, tail=5))
    made = plan(pool.block_table, pool.seqlens_k, 16, da.Mask(*mask), cu_seqlens_q=pool.cu_seqlens_q, workers=workers)
    assert made is not None and (made[0, 5] > 0) == (mask == CAUSAL)
    pool.check(lane, plan=made)


@ON_EACH_CARD
def test_a_prefix_in_parts(lane: Lane) -> None:
    """Shared keys that are cut, and of which each sequence goes on by itself."""
    pool = make(
        Case(((1,) * 13, tuple(1100 + 7 * n for n in range(13))), (2, 1), (32, 32), BF16, shared=1088, sink=True)
    )
    made = plan(pool.block_table, pool.seqlens_k, 16, workers=Workers(64, 3))
    assert made is not None and made[0, 5] > 1
    pool.check(lane, plan=made)


@ON_EACH_CARD
def test_a_damaged_plan_that_merges_nothing(lane: Lane) -> None:
    """It leaves the rows alone, instead of reading the part before the first."""
    pool = make(Case(((1, 1), (700, 900)), (2, 1), (32, 32), BF16))
    made = plan(pool.block_table, pool.seqlens_k, 16, workers=Workers(64, 3))
    assert made is not None and made[0, 1] > 0
    merge = made[1 + int(made[0, 0]) :][: int(made[0, 1])]
    rows = [row for begin, end in merge[:, :2].tolist() for row in range(begin, end)]
    assert not pool.run(lane, plan=made)["out"][rows].isnan().any()
    merge[:, [3, 6]] = 0
    assert pool.run(lane, plan=made)["out"][rows].isnan().all()


@ON_EACH_CARD
def test_distances_in_a_shared_tile(lane: Lane) -> None:
    pool = make(
        Case(((1,) * 13, tuple(300 + 7 * n for n in range(13))), (4, 2), (32, 32), BF16, shared=288, alibi=True)
    )
    made = plan(pool.block_table, pool.seqlens_k, 16)
    assert made is not None and made[0, 5] > 0
    pool.check(lane, plan=made)


@ON_EACH_CARD
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_rotated_queries(lane: Lane, decodes: bool, interleaved: bool) -> None:
    """By each row's own position, in tiles that rows of several sequences share too."""
    lens_q = (1,) * 13 if decodes else (1, 3) * 6 + (2,)
    pool = make(Case((lens_q, tuple(300 + 7 * n for n in range(13))), (2, 1), (32, 32), BF16, shared=288))
    angle = torch.rand(500, 12, generator=torch.Generator().manual_seed(3)) * 6
    given = {"rope_cos": angle.cos(), "rope_sin": angle.sin(), "rope_interleaved": interleaved}
    position = torch.cat([torch.arange(k - q, k) for q, k in zip(lens_q, pool.seqlens_k.tolist(), strict=True)])
    turned = rotated(pool.q, position, angle.cos(), angle.sin(), interleaved).to(BF16)
    want = dataclasses.replace(pool, q=turned).run(lane)["out"].clone()
    made = plan(pool.block_table, pool.seqlens_k, 16, cu_seqlens_q=pool.cu_seqlens_q)
    assert made is not None and made[0, 5] > 0
    for options in ({}, {"plan": made}):
        torch.testing.assert_close(pool.run(lane, **given, **options)["out"], want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("page_size", [8, 24, 64, 192])
@pytest.mark.parametrize("head_dim", [64, 96, 192, 256])
def test_a_prompt_in_boxes_of_slots(lane: Lane, head_dim: int, page_size: int) -> None:
    """Pages that fill a block of keys or are filled by it, and those that neither do; keys begin inside a page."""
    case = Case(
        ((70, 3), (520, 260)), (3, 1), (head_dim, head_dim), BF16, page_size=page_size, mask=(0, 100, 0), tail=2
    )
    for splits in (1, 40):
        draw(head_dim, processors=splits)
        make(dataclasses.replace(case, sink=page_size == 24, strided=page_size == 64)).check(lane)


@ON_EACH_CARD
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_that_begin_anywhere(lane: Lane, offset: int) -> None:
    """Queries on 2 and on 16 bytes, rotated; an output of which as many numbers are stored at once as its rows allow."""
    pool = make(Case(((70, 3), (130, 40)), (3, 1), (64, 64), BF16))
    stored = torch.full((73, 3, 64 + 16), math.nan, dtype=BF16)
    q = stored[..., offset : offset + 64].copy_(pool.q)
    angle = torch.rand(200, 16, generator=torch.Generator().manual_seed(3)) * 6
    given = {"rope_cos": angle.cos(), "rope_sin": angle.sin()}
    position = torch.cat([torch.arange(60, 130), torch.arange(37, 40)])
    turned = dataclasses.replace(pool, q=rotated(pool.q, position, angle.cos(), angle.sin(), False).to(BF16))
    want = turned.run(lane)["out"]
    got = da.paged_attention(
        q, pool.k_pages, pool.v_pages, pool.block_table, pool.seqlens_k, cu_seqlens_q=pool.cu_seqlens_q, max_seqlen_q=70,
        backend="cuda", **given,
    )  # fmt: skip
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


@ON_EACH_CARD
@pytest.mark.parametrize("left", [None, 2200])
def test_batch_invariant_in_every_bit(lane: Lane, left: int | None) -> None:
    """A row's bits: alone, among others, one at a time and in chunks, with a plan and without, on any card."""
    whole = make(
        Case(((20,), (2310,)), (4, 2), (32, 32), BF16, mask=(0, left, 0))
    )  # rows on both sides of a block's end
    bits = whole.check(lane, batch_invariant=True)["out"].clone()
    for seed, (chunk, end) in enumerate(itertools.product((1, 7), (8, 20))):
        q = whole.q[end - chunk : end]
        other = torch.randn(1, *q.shape[1:], generator=torch.Generator().manual_seed(end)).to(BF16)
        part = dataclasses.replace(
            whole,
            q=torch.cat([q, other]),
            block_table=whole.block_table.expand(2, -1),
            seqlens_k=torch.tensor([2290 + end, 33], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, chunk, chunk + 1], dtype=torch.int32),
        )
        made = plan(
            part.block_table.contiguous(), part.seqlens_k, 16, da.Mask(0, left, 0), cu_seqlens_q=part.cu_seqlens_q, batch_invariant=True,
            workers=Workers(64, 4),
        )  # fmt: skip
        for given in (None, made):
            draw(seed, processors=1 + 50 * (seed % 2))
            got = part.run(lane, cu_seqlens_q=part.cu_seqlens_q, max_seqlen_q=chunk, batch_invariant=True, plan=given)[
                "out"
            ]
            assert torch.equal(got[:chunk], bits[end - chunk : end]), f"rows {end - chunk} to {end}"


@pytest.mark.parametrize("card", [*CARDS.values(), 120], ids=[*CARDS, "later"])
@pytest.mark.parametrize("heads", [(3, 1), (12, 2)])
def test_many_parts(lane: Lane, heads: tuple[int, int]) -> None:
    """More than lanes have a weight each, of more rows than have blocks of their own; results on 16 bytes, which teams of lanes
    add up, and off them."""
    draw(0, processors=132)
    pool = make(Case(((1, 20), (5200, 700)), heads, (32, 32), BF16, sink=True))
    for invariant in (False, True):
        want = pool.check(lane, batch_invariant=invariant)
        out, lse = da.paged_attention(
            pool.q, pool.k_pages, pool.v_pages, pool.block_table, pool.seqlens_k, da.causal(), cu_seqlens_q=pool.cu_seqlens_q,
            max_seqlen_q=20, sink=pool.packed.sink, return_lse=True, batch_invariant=invariant, backend="cuda",
        )  # fmt: skip
        close = {"rtol": 0, "atol": 0} if invariant else {"rtol": 1e-6, "atol": 0}  # teams add in another order
        torch.testing.assert_close(lse, want["lse"], **close)
        torch.testing.assert_close(out, want["out"], **(close if invariant else {"rtol": 2**-7, "atol": 1e-5}))


@ON_EACH_CARD
@pytest.mark.parametrize("stored", [None, FLOAT8])
def test_same_bits_in_every_order(lane: Lane, stored: torch.dtype | None) -> None:
    pool = make(Case(((1, 5, 1), (600, 300, 40)), (4, 2), (64, 64), FP16, stored))
    kept = set()
    for seed in range(12):
        draw(seed, processors=2)
        got = pool.run(lane)
        kept.add(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in got.values()))
    assert len(kept) == 1


NANS = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_float8_is_what_it_is(lane: Lane, dtype: torch.dtype) -> None:
    """One key whose value has each number; NaN too."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    pages = torch.zeros(1, 1, 1, 256).to(FLOAT8)
    values = numbers.reshape(1, 1, 1, 256)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    out = da.paged_attention(torch.zeros(1, 1, 256, dtype=dtype), pages, values, table, lengths, backend="cuda")
    assert torch.equal(out[0, 0].isnan(), torch.isin(numbers.view(torch.uint8), NANS))
    torch.testing.assert_close(out[0, 0].float(), numbers.float(), rtol=0, atol=0, equal_nan=True)


INVARIANT = pytest.mark.parametrize("invariant", [False, True])  # with it, tiles are the large ones


@ON_EACH_CARD
@INVARIANT
@pytest.mark.parametrize("stored", [INT8, FLOAT8])
def test_scales_and_queries_of_any_size(lane: Lane, stored: torch.dtype, invariant: bool) -> None:
    attention.test_scales_and_queries_of_any_size(lane, stored, invariant)


def test_scales_far_apart(lane: Lane, tmp_path: Path) -> None:
    """Their pages lie 2^32 numbers from each other, which Hopper's decoding leaves to the other kernel."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(-127, 128, (2, 16, 1, 64), generator=generator, dtype=INT8)
    near, q = torch.rand(2, 16, 1, generator=generator), torch.randn(2, 2, 64, generator=generator).to(BF16)
    table, lengths = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), torch.tensor([30, 20], dtype=torch.int32)
    holes = torch.from_file(str(tmp_path / "scales"), shared=True, size=2**32 + 16)
    far = holes.as_strided((2, 16, 1), (2**32, 1, 1)).copy_(near)

    def out(scales: torch.Tensor) -> torch.Tensor:
        return da.paged_attention(q, pages, pages, table, lengths, k_scales=scales, v_scales=near, backend="cuda")

    torch.testing.assert_close(out(far), out(near), rtol=0.01, atol=0.01)


@INVARIANT
def test_lengths_and_tables_that_lie_reach_no_further_than_the_tensors(lane: Lane, invariant: bool) -> None:
    """Beside the operator, which checks contents on the CPU."""
    pool = make(Case(((1, 2), (40, 20)), (2, 1), (16, 16), BF16))
    table = torch.tensor([[2**31 - 1, -5, 3], [7, -(2**31), 0]], dtype=torch.int32)
    pages = torch.randn(5, 16, 1, 16).to(BF16)
    out, lse = torch.empty(3, 2, 16, dtype=BF16), torch.empty(2, 3)
    wild = torch.randint(-(2**31), 2**31 - 1, (7, 8), generator=torch.Generator().manual_seed(0)).int()
    wild[0, :2] = torch.tensor([3, 2])
    draw(1)
    for given in (None, wild):
        torch.ops.duplex_attn_cuda.paged_attention(
            pool.q, pages, pages, table, torch.tensor([2**31 - 1, -3], dtype=torch.int32),
            torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32), 2, torch.tensor([2**30, -1], dtype=torch.int32), None, 0, False,
            None, None, None, None, None, None, None, None, None, None, False, None, 0.0, invariant, given, out, lse,
        )  # fmt: skip
    positions = torch.tensor([2**31 - 1, -7, 3], dtype=torch.int32)
    torch.ops.duplex_attn_cuda.paged_append(
        pages[0, :3], pages[1, :3], pages.clone(), pages.clone(), table, positions, torch.tensor([0, 9, 1], dtype=torch.int32),
        None, None, False, None, None,
    )  # fmt: skip


test_tokens_land_in_their_slots = append.test_tokens_land_in_their_slots
test_given_scales_are_read = append.test_given_scales_are_read
test_every_float8_is_rounded_to_nearest_even = append.test_every_float8_is_rounded_to_nearest_even
test_copied_pages = append.test_copied_pages
test_per_tensor_scales_are_not_copied = append.test_per_tensor_scales_are_not_copied


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.int32, torch.int64, torch.complex64], ids=str)
def test_copied_pages_of_whatever_they_hold(lane: Lane, dtype: torch.dtype) -> None:
    pages = torch.arange(3 * 4 * 2 * 5).reshape(3, 4, 2, 5).to(dtype)
    src, dst = (torch.tensor([n], dtype=torch.int32) for n in (2, 0))
    da.copy_pages(pages, pages.clone(), src, dst, backend=lane.backend)
    assert torch.equal(pages[0], pages[2]) and (pages[1].flatten()[1:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("stored", [None, INT8, FLOAT8])
@pytest.mark.parametrize(("pairs", "at"), [(64, 0), (48, 0), (48, 1), (20, 0)])
def test_rows_that_move_16_bytes_at_a_time(
    lane: Lane, stored: torch.dtype | None, interleaved: bool, dtype: torch.dtype, pairs: int, at: int
) -> None:
    """Appended as by the reference, bit by bit where nothing is rotated. Tables that begin off 16 bytes, and pairs that do not fill
    them, cannot."""
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(7, 6, dim, generator=g).to(dtype) for dim in (128, 64))
    angle = torch.rand(40 * pairs + at, generator=g) * 6
    cos, sin = (x[at:].view(40, pairs) for x in (angle.cos(), angle.sin()))
    table, cu = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    positions = torch.tensor([14, 15, 16, 0, 31, -1, 2], dtype=torch.int32)
    kept = []
    for backend in ("reference", "cuda"):
        pages = [torch.zeros(4, 16, 6, dim).to(stored or dtype) for dim in (128, 64)]
        scales = [torch.zeros(4, 16, 6) for _ in pages] if stored else [None, None]
        da.paged_append(
            k, v, *pages, table, positions, cu, rope_cos=cos, rope_sin=sin, rope_interleaved=interleaved,
            k_scales=scales[0], v_scales=scales[1], backend=backend,
        )  # fmt: skip
        kept.append((pages, scales))
    (want_k, want_v), want_scales = kept[0]
    (got_k, got_v), got_scales = kept[1]
    assert torch.equal(got_v.view(torch.uint8), want_v.view(torch.uint8))
    step = {None: 2 * torch.finfo(dtype).eps, INT8: 1.0, FLOAT8: 0.13}[stored]
    torch.testing.assert_close(got_k.float(), want_k.float(), rtol=step, atol=step)
    for got, want in zip(got_scales, want_scales, strict=True):
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16])
@pytest.mark.parametrize("dim", [7, 64, 256])
@pytest.mark.parametrize(("parts", "step"), [(4, 1), (4, 8), (2, 8), (32, 8), (21, 1)])
def test_merge(lane: Lane, dim: int, dtype: torch.dtype, parts: int, step: int) -> None:
    """Of strided parts, on 16 bytes and off them; one without weight holds NaN, one row has no weight at all."""
    g = torch.Generator().manual_seed(dim)
    widths = [dim + step * n for n in range(parts)]
    outs = [torch.randn(2, 3, 5, width, generator=g).to(dtype)[..., :dim].transpose(1, 2) for width in widths]
    lses = [3 * torch.randn(2, 5, 3, generator=g).transpose(1, 2) for _ in outs]
    outs[1][0], lses[1][0] = math.nan, -math.inf
    for lse in lses:
        lse[1, 2, 3] = -math.inf
    weights = torch.stack(lses).double().softmax(0).nan_to_num(0)  # (part, batch, head, row)
    numbers = torch.stack(outs).double().nan_to_num(0)
    want = (weights.transpose(2, 3)[..., None] * numbers).sum(0)
    out, lse = da.merge_attention(outs, lses, backend="cuda")
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=2 * eps, atol=eps * parts / 2)
    torch.testing.assert_close(lse.double(), torch.stack(lses).double().logsumexp(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 257])
def test_rows_that_merges_do_not_take(lane: Lane, dim: int) -> None:
    with pytest.raises(ValueError, match="a head_dim of 1 to 256"):
        da.merge_attention([torch.zeros(3, 2, dim)], [torch.zeros(2, 3)], backend="cuda")


# Two stages in flight that several warps read, parts that are merged, rows of bytes.
CASE = Case(((1, 3), (700, 150)), (2, 1), (128, 128), BF16)
# Hopper's: several tiles a block.
PROMPT = Case(((150, 30), (300, 150)), (2, 1), (128, 128), BF16)
STAGES = [f"{of}_{stage}" for stage in range(2) for of in ("k_full", "k_empty", "v_full", "v_empty")]


def is_noticed(pool: Pool, lane: Lane, what: str, number: int = 0, seeds: int = 8, **options: object) -> bool:
    with left_out(what, number):
        for seed in range(seeds):
            draw(seed, processors=1)
            try:
                pool.check(lane, **options)
            except (RuntimeError, AssertionError):
                return True
    return False


@pytest.mark.parametrize("card", [CARDS["sm80"]])
@pytest.mark.parametrize("stored", [None, INT8])
@pytest.mark.parametrize("what", ["copy_wait", "block_sync"])
def test_what_is_left_out_is_noticed(lane: Lane, card: int, what: str, stored: torch.dtype | None) -> None:
    assert is_noticed(make(dataclasses.replace(CASE, stored=stored)), lane, what)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("nothing", 0),
        pytest.param("mbarrier_wait", 0, id="tile_done"),
        *(pytest.param("mbarrier_wait", n, id=name) for n, name in ((1, "full_0"), (2, "empty_0"), (3, "full_1"))),
        pytest.param("named_sync", 1, id="sums_are_there"),
        *((what, 0) for what in ("proxy_fence", "warp_sync", "block_sync")),
    ],
)
@pytest.mark.parametrize("stored", [None, INT8])
def test_what_decoding_leaves_out_is_noticed(lane: Lane, stored: torch.dtype | None, what: str, number: int) -> None:
    """Several tiles a block, all stages come round, strangers behind the keys."""
    pool = make(Case(((1, 3, 1, 1), (700, 150, 410, 75)), (2, 1), (128, 128), BF16, stored))
    made = plan(pool.block_table, pool.seqlens_k, 16, cu_seqlens_q=pool.cu_seqlens_q, workers=Workers(64, 1))
    assert is_noticed(pool, lane, what, number, seeds=24, plan=made) == (what != "nothing")


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("nothing", 0),
        *(pytest.param("mbarrier_wait", n, id=name) for n, name in enumerate(STAGES, 4)),
        pytest.param("named_sync", 3, id="strangers_cleared"),
        pytest.param("named_sync", 4, id="queries_are_there"),
        *((what, 0) for what in ("proxy_fence", "product_wait", "product_fence", "block_sync")),
    ],
)
def test_what_a_prompt_leaves_out_is_noticed(lane: Lane, what: str, number: int) -> None:
    pool = make(PROMPT)
    made = plan(pool.block_table, pool.seqlens_k, 16, cu_seqlens_q=pool.cu_seqlens_q, workers=Workers(64, 1))
    assert is_noticed(pool, lane, what, number, seeds=24, plan=made) == (what != "nothing")
