"""paged_attention on every backend against the float64 oracle over the gathered keys."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from duplex_attn import Mask, paged_attention
from duplex_attn.paged import functional

from ..lanes import Lane
from ..oracle import answer, assert_accurate, floors
from .pool import Case, make

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn

CHOICES = {
    "lengths": [
        ((1, 1, 1), (37, 1, 130)),  # decoding
        ((1, 1), (300, 1100)),
        ((5, 17), (70, 33)),  # chunks of prefill
        ((1, 60, 4, 1), (90, 60, 64, 5)),  # mixed
        ((0, 3, 2, 0), (4, 3, 0, 0)),  # empty sequences, queries without keys
        ((70,), (700,)),
        ((2, 2, 2), (40, 20, 64)),
        ((3, 11, 1), (40, 300, 13)),  # a few rows each
    ],
    "heads": [(2, 2), (5, 5), (4, 2), (14, 7), (3, 1), (8, 1), (12, 1)],
    "head_dims": [(64, 64), (128, 128), (32, 96), (40, 24), (8, 256)],
    "dtype": [FLOAT32, FLOAT16, BFLOAT16],
    "stored": [None, None, INT8, FLOAT8],
    "scales": ["token", "head", "tensor", "none"],
    "page_size": [16, 1, 3, 64, 256],
    "mask": [(0, None, 0), (0, None, None), (9, None, 0), (0, 20, 0), (3, 15, 0), (0, 6, 6), "prefix_each"],
    "top_left": [False, False, False, True],
    "scale": [None, 0.3, -0.2],
    "softcap": [0.0, 0.0, 2.0],
    "distance_radius": [None, None, 5],
    "alibi": [False, False, True],
    "row_col_radius": [None, None, 2, 100],
    "bias": ["none", "none", "full", "keys", "bool"],
    "sink": [False, True],
    "strided": [False, True],
    "tail": [0, 0, 3],
}


def cases(count: int, seed: int) -> list[Case]:
    """Random combinations in which every pair of choices of two fields comes up early."""
    rng = random.Random(seed)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(CHOICES, 2)
        for x in range(len(CHOICES[a]))
        for y in range(len(CHOICES[b]))
    }
    made = []
    for n in range(count):
        candidates = [{name: rng.randrange(len(values)) for name, values in CHOICES.items()} for _ in range(30)]

        best = max(candidates, key=lambda c, left=pairs: len(left.intersection(itertools.combinations(c.items(), 2))))
        pairs -= set(itertools.combinations(best.items(), 2))
        fields = {name: CHOICES[name][x] for name, x in best.items()}
        if fields["mask"] == "prefix_each":
            fields["mask"] = (tuple(rng.randrange(80) for _ in fields["lengths"][0]), None, 0)
        made.append(Case(**fields, seed=n))
    return made


@pytest.mark.parametrize("case", cases(60, seed=0), ids=str)
def test_call(lane: Lane, case: Case) -> None:
    if lane.slow and case.seed % 3:
        pytest.skip("the interpreter runs every third")
    make(case).check(lane)


@pytest.mark.parametrize("stored", [None, INT8, FLOAT8])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_shared_prefix(lane: Lane, heads: tuple[int, int], dtype: torch.dtype, stored: torch.dtype | None) -> None:
    """Sixteen sequences that start with the same pages, some ending right behind them, and one that does not share."""
    if lane.slow and (stored is not None or heads != (8, 2)):
        pytest.skip("the interpreter runs a few")
    tail = (0, 5, 16, 70) * 4
    lens_k = tuple(400 + n for n in tail)
    case = Case(((1,) * 16, lens_k), heads, (64, 64), dtype, stored, shared=400, sink=True)
    pool = make(case)
    pool.check(lane)
    pool = make(dataclasses.replace(case, lengths=((1, 3) * 8, lens_k), mask=(0, None, 0)))
    pool.check(lane)
    pool = make(dataclasses.replace(case, mask=(0, 350, 0)))  # a window that hides some of the prefix
    pool.check(lane)


@pytest.mark.parametrize("count", [2, 5, 13])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_few_that_share_a_prefix(lane: Lane, dtype: torch.dtype, count: int) -> None:
    shared = 288 if lane.slow else 1040
    keys = tuple(range(shared + 13, shared + 13 + count))
    make(Case(((1,) * count, keys), (8, 2), (32, 64), dtype, shared=shared, sink=True)).check(lane)


@pytest.mark.parametrize("mask", [(700, 30, 0), (700, None, None), (3, 500, 0)], ids=str)
def test_keys_in_parts_under_a_prefix_and_a_window(lane: Lane, mask: tuple) -> None:
    """A prefix that ends inside a later part, and windows that begin in one."""
    make(Case(((1, 2), (900, 1100)), (4, 2), (16, 32), mask=mask, page_size=64)).check(lane)


def test_one_batch_of_all_directions(lane: Lane) -> None:
    """Encoding (prefix = length), prefix-LM and decoding in one call, each equal to a call of its own."""
    lens_q, lens_k, prefix = (24, 30, 1), (24, 30, 90), (24, 11, 0)
    whole = make(Case((lens_q, lens_k), (4, 2), (64, 64), mask=(prefix, None, 0)))
    together = whole.check(lane)
    for n in range(3):
        rows = slice(*whole.cu_seqlens_q[n : n + 2].tolist())
        one = dataclasses.replace(
            whole,
            q=whole.q[rows],
            block_table=whole.block_table[n : n + 1],
            seqlens_k=whole.seqlens_k[n : n + 1],
            cu_seqlens_q=torch.tensor([0, lens_q[n]], dtype=torch.int32),
            packed=dataclasses.replace(whole.packed, prefix=prefix[n]),
        )
        alone = one.run(lane, cu_seqlens_q=one.cu_seqlens_q, max_seqlen_q=lens_q[n])
        torch.testing.assert_close(alone["out"], together["out"][rows], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_batch_invariant_in_every_bit(lane: Lane, dtype: torch.dtype, sink: bool) -> None:
    """A row's bits: alone, among others, one at a time and in chunks of any size. Some have one part, others two."""
    length = 40 if lane.slow or lane.backend == "reference" else 300
    before = 0 if lane.slow else 1900
    whole = make(Case(((length,), (length + before,)), (4, 2), (64, 64), dtype, page_size=16, sink=sink))
    bits = {name: x.clone() for name, x in whole.run(lane, batch_invariant=True).items()}
    for chunk in (1, 7, 64) if lane.backend != "reference" else (length,):  # it makes no promise of chunks
        for end in range(chunk, length + 1, 37 if chunk == 1 else chunk):
            q = whole.q[end - chunk : end]
            other = torch.randn(1, *q.shape[1:], generator=torch.Generator().manual_seed(end)).to(dtype)
            lengths = torch.tensor([end + int(whole.seqlens_k) - length, 33], dtype=torch.int32)
            part = dataclasses.replace(
                whole,
                q=torch.cat([q, other]),
                block_table=whole.block_table.expand(2, -1),
                seqlens_k=lengths,
                cu_seqlens_q=torch.tensor([0, chunk, chunk + 1], dtype=torch.int32),
            )
            got = part.run(lane, cu_seqlens_q=part.cu_seqlens_q, max_seqlen_q=chunk, batch_invariant=True)
            for x, of_whole in ((got["out"], bits["out"]), (got["lse"].T, bits["lse"].T)):
                assert torch.equal(x[:chunk], of_whole[end - chunk : end]), f"rows {end - chunk} to {end}"


def test_the_same_bits_in_every_run(lane: Lane) -> None:
    pool = make(Case(((1,) * 5, (30, 2900, 700, 1, 64)), (4, 2), (64, 64)))
    first = pool.run(lane)
    for _ in range(3):
        again = pool.run(lane)
        assert torch.equal(first["out"], again["out"]) and torch.equal(first["lse"], again["lse"])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_and_queries_of_any_size(lane: Lane, stored: torch.dtype, invariant: bool) -> None:
    """From 2^-60 to 2^60, sequence by sequence, and values that grow from key to key: whatever is multiplied stays in range."""
    lens = (150, 70, 200)
    pool = make(Case(((1, 1, 1), lens), (4, 2), (32, 32), torch.bfloat16, stored))
    assert pool.k_scales is not None and pool.v_scales is not None
    power, v = 2.0 ** torch.tensor([-60, 0, 60]), pool.packed.v.clone()
    for b, rows in enumerate(v.split(lens)):
        j = torch.arange(lens[b])
        at, growth = (pool.block_table[b, j // 16].long(), j % 16), (2.0 ** (j // 16 * 4 - 30))[:, None]
        pool.k_scales[at] /= power[b]
        pool.v_scales[at] *= power[b] * growth
        rows *= power[b] * growth[..., None]
    scores_as_before = pool.packed.q
    pool.q = pool.q * power.bfloat16()[:, None, None]
    got = pool.run(lane, batch_invariant=invariant)["out"].double()
    want = answer(dataclasses.replace(pool.packed, q=scores_as_before, v=v), torch.float64)["out"]
    largest = want.abs().amax((1, 2), keepdim=True)
    assert (largest > 0).all()
    torch.testing.assert_close(got / largest, want / largest, rtol=0.02, atol=0.01)


def test_values_of_the_smallest_worth(lane: Lane) -> None:
    """Near the end of bfloat16's range, where a quotient by the largest weight is none."""
    pool = make(Case(((1, 1), (150, 70)), (4, 2), (64, 64), BFLOAT16, torch.int8))
    assert pool.v_scales is not None
    want = pool.run(lane)["out"].double()
    pool.v_scales *= 2.0**-112
    torch.testing.assert_close(pool.run(lane)["out"].double() * 2.0**112, want, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("head_dims", [(96, 32), (64, 160)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_queries_with_one_large_number_and_scales_of_any_sign(
    lane: Lane, head_dims: tuple[int, int], sign: int
) -> None:
    """The large one meets zeros: what the others are worth must not be lost beside it."""
    pool = make(Case(((1, 2), (150, 70)), (4, 2), head_dims, BFLOAT16, torch.int8))
    assert pool.k_scales is not None and pool.v_scales is not None
    pool.q[..., 5] = 4096.0
    pool.k_pages[..., 5] = 0
    for scales, rows in ((pool.k_scales, pool.packed.k), (pool.v_scales, pool.packed.v)):
        odd = 1 - (1 - sign) * (torch.arange(scales.shape[1]) % 2)
        scales *= odd[:, None]
        rows *= torch.cat([odd[torch.arange(n) % len(odd)] for n in pool.seqlens_k.tolist()])[:, None, None]
    call = dataclasses.replace(pool.packed, q=pool.q)
    call.k[..., 5] = 0
    exact, plain = answer(call, torch.float64), answer(call, BFLOAT16)
    assert_accurate(pool.run(lane), exact, plain, floors(call, exact), f"{lane}")


def test_lengths_and_ids_that_do_not_lie_side_by_side(lane: Lane) -> None:
    pool = make(Case(((5, 17), (70, 33)), mask=((9, 0), None, 0)))
    apart = dataclasses.replace(
        pool,
        seqlens_k=column(pool.seqlens_k),
        cu_seqlens_q=column(pool.cu_seqlens_q),
        block_table=column(pool.block_table),
    )
    got, want = apart.run(lane), pool.run(lane)
    assert torch.equal(got["out"], want["out"]) and torch.equal(got["lse"], want["lse"])


def test_tables_that_do_not_lie_side_by_side(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operator may be given them by others than the call of the package, which lays them out first."""
    monkeypatch.setattr(functional, "table", lambda name, x, dtype: x)
    pool = make(Case(((5, 17), (70, 33)), distance_radius=3, alibi=True, sink=True))
    tables = {name: column(getattr(pool.packed, name)) for name in ("distance_bias", "alibi_slopes", "sink")}
    apart = dataclasses.replace(pool, packed=dataclasses.replace(pool.packed, **tables))
    got, want = apart.run(lane), pool.run(lane)
    assert torch.equal(got["out"], want["out"]) and torch.equal(got["lse"], want["lse"])


def column(x: torch.Tensor) -> torch.Tensor:
    """x between numbers that are not its own."""
    return torch.stack([x, x + 1], -1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_no_row_of_a_prompt_sees_may_be_anything(dtype: torch.dtype) -> None:
    """They lie behind the window, in one run of slots with keys that are seen."""
    rows, keys, left = 40, 300, 50
    q, k, v = (torch.randn(n, 2, 64).to(dtype) for n in (rows, keys, keys))
    lengths, cu = (torch.tensor(x, dtype=torch.int32) for x in ([keys], [0, rows]))
    first = keys - rows - left

    def run(mask: Mask, begin: int, end: int, filled: float) -> torch.Tensor:
        pages = [torch.full((1, 256, 2, 64), filled, dtype=dtype).repeat(2, 1, 1, 1) for _ in "kv"]
        for page, x in zip(pages, (k, v), strict=True):
            page.flatten(0, 1)[begin:end] = x[begin:end]
        both = torch.tensor([[0, 1]], dtype=torch.int32)
        return paged_attention(q, *pages, both, lengths, mask, cu_seqlens_q=cu, max_seqlen_q=rows, backend="cpu")

    window = Mask(0, left, 0)
    assert torch.equal(run(window, first, keys, float("nan")), run(window, first, keys, 0.0))
