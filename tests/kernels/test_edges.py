"""Sizes of nothing, and values at the ends of their range."""

import dataclasses
import math

import duplex_attn as da
import pytest
import torch

from ..cases import Case, make
from ..lanes import Lane, run
from ..oracle import Call, answer, assert_accurate, floors

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def compare(call: Call, lane: Lane, lse_gradient: bool = True) -> None:
    dout = normal(*call.q.shape[:-1], call.v.shape[-1]).to(call.q.dtype)
    dlse = normal(*answer(call, torch.float32)["lse"].shape) if lse_gradient else None
    exact, plain = answer(call, torch.float64, dout, dlse), answer(call, call.q.dtype, dout, dlse)
    for deterministic in (True, False):
        assert_accurate(
            run(call, lane, dout, dlse, deterministic), exact, plain, floors(call, exact, dout, dlse), str(lane)
        )


SIZES_OF_NOTHING = [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("batch", "len_q", "len_k"), SIZES_OF_NOTHING)
def test_dense_without_rows(lane: Lane, batch: int, len_q: int, len_k: int, sink: bool) -> None:
    call = Call(normal(batch, len_q, 4, 8), normal(batch, len_k, 2, 8), normal(batch, len_k, 2, 16), right=0)
    call.bias, call.distance_bias = normal(1, 4, 1, 1), normal(4, 5)
    call.sink = normal(4) if sink else None
    compare(call, lane)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("rows_q", "rows_k", "cu"), [(0, 0, [0]), (0, 0, [0, 0, 0]), (4, 4, [0]), (4, 4, [0, 0]), (3, 0, [0, 0, 0])]
)
def test_packed_without_rows(lane: Lane, rows_q: int, rows_k: int, cu: list[int], sink: bool) -> None:
    call = Call(normal(rows_q, 2, 8), normal(rows_k, 2, 8), normal(rows_k, 2, 8), int32(*cu), int32(*cu))
    call.sink = normal(2) if sink else None
    compare(call, lane)


def test_queries_without_keys_in_one_sequence_only(lane: Lane) -> None:
    cu_q, cu_k = int32(0, 2, 5, 6), int32(0, 4, 4, 9)
    compare(Call(normal(6, 2, 8), normal(9, 1, 8), normal(9, 1, 8), cu_q, cu_k), lane)


@pytest.mark.parametrize("layout", ["packed", "padded_anywhere"])
def test_lengths_that_do_not_lie_side_by_side(lane: Lane, layout: str) -> None:
    made = make(Case(layout, ((20, 3, 9), (20, 5, 30)), mask="prefix_each"))
    apart, names = dataclasses.replace(made.call), ("seqlens_q", "seqlens_k", "starts_q", "starts_k", "prefix")
    for name in (*names, "cu_seqlens_q", "cu_seqlens_k"):
        x = getattr(made.call, name)
        if x is not None:
            setattr(apart, name, torch.stack([x, x + 7], 1)[:, 0])
    got, want = (run(call, lane, made.dout, made.dlse, deterministic=True) for call in (apart, made.call))
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_tables_that_do_not_lie_side_by_side(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an operator may be given them by others than the calls of the package, which lay them out first."""
    monkeypatch.setattr(da.functional, "table", lambda name, x, dtype: x)
    call = Call(normal(1, 20, 4, 8), normal(1, 30, 2, 8), normal(1, 30, 2, 16))
    call.distance_bias, call.alibi_slopes, call.sink = normal(4, 5), normal(4).abs(), normal(4)
    apart, dout = dataclasses.replace(call), normal(1, 20, 4, 16)
    for name in ("distance_bias", "alibi_slopes", "sink"):
        x = getattr(call, name)
        setattr(apart, name, torch.stack([x, x + 7], -1)[..., 0])
    got, want = (run(x, lane, dout, deterministic=True) for x in (apart, call))
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_far_beyond_what_exp_holds(lane: Lane, dtype: torch.dtype) -> None:
    """Scores of +-several hundred: the softmax must subtract its maximum, block after block."""
    q, k, v = 20 * normal(1, 20, 2, 16), 20 * normal(1, 300, 2, 16), normal(1, 300, 2, 16)
    made = Call(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.25)
    assert answer(made, torch.float64)["lse"].abs().max() > 300
    compare(made, lane)


def test_scores_that_only_grow_and_only_shrink(lane: Lane) -> None:
    """Every next block of keys holds a new maximum (or never): the running rescale in both directions."""
    for slope in (1.0, -1.0):
        k = slope * torch.arange(400.0)[None, :, None, None].expand(1, 400, 1, 8) / 8
        compare(Call(torch.ones(1, 3, 1, 8), k.contiguous(), normal(1, 400, 1, 8), scale=1.0), lane)


def test_a_bias_that_hides_all_keys_of_whole_blocks(lane: Lane) -> None:
    """The first 200 keys at -inf: nothing is seen until late, so a running maximum of -inf must not become NaN."""
    call = Call(normal(1, 70, 1, 16), normal(1, 260, 1, 16), normal(1, 260, 1, 16))
    call.bias = torch.zeros(1, 1, 70, 260)
    call.bias[..., :200] = -math.inf
    call.bias[..., 5, :] = -math.inf
    compare(call, lane)
    call.bias = call.bias.isfinite()
    compare(call, lane)


def test_the_most_negative_finite_bias_is_a_number(lane: Lane) -> None:
    """transformers' masks are finfo.min, not -inf: a row of nothing else is a plain average, not a hidden row."""
    call = Call(torch.zeros(1, 4, 1, 8), normal(1, 70, 1, 8), normal(1, 70, 1, 8), bias=torch.zeros(1, 1, 4, 70))
    call.bias[..., 10:] = torch.finfo(torch.float32).min
    call.bias[..., 2, :] = torch.finfo(torch.float32).min
    got = run(call, lane)["out"].cpu()
    torch.testing.assert_close(got[0, 0, 0], call.v[0, :10, 0].mean(0))
    torch.testing.assert_close(got[0, 2, 0], call.v[0, :, 0].mean(0))


def test_a_bias_where_the_span_hides_is_not_read_into_the_result(lane: Lane) -> None:
    """s = -inf where the span hides j, whatever the bias holds there."""
    call = Call(
        normal(2, 70, 2, 16), normal(2, 70, 2, 16), normal(2, 70, 2, 16), left=5, right=0, bias=normal(2, 1, 70, 70)
    )
    hidden = ~torch.ones(70, 70).tril().triu(-5).bool()
    clean = run(call, lane, torch.ones(2, 70, 2, 16), deterministic=True)
    for junk in (math.nan, math.inf, -math.inf):
        call.bias = call.bias.masked_fill(hidden, junk)
        got = run(call, lane, torch.ones(2, 70, 2, 16), deterministic=True)
        assert all(torch.equal(got[name], clean[name]) for name in clean), junk


@pytest.mark.parametrize("sink", [60.0, -60.0, 1e4, -1e4])
def test_sinks_that_take_all_or_nothing(lane: Lane, sink: float) -> None:
    call = Call(normal(1, 5, 2, 8), normal(1, 70, 2, 8), normal(1, 70, 2, 8), sink=torch.tensor([sink, 0.0]))
    compare(call, lane)


def test_each_head_dim_from_1_to_40_and_the_ends(lane: Lane) -> None:
    """Tails of every width: a head_dim that is no multiple of the vector must not read its neighbour."""
    widths = [*range(1, 41), 63, 65, 127, 129, 191, 249, 255, 256] if not lane.slow else [1, 2, 7, 17, 33, 65, 129, 255]
    for n, width in enumerate(widths):
        dtype = (torch.float32, torch.float16, torch.bfloat16)[n % 3]
        case = Case("dense_sliced", ((9,), (20,)), (2, 1), (width, widths[-1 - n]), dtype, mask="causal", seed=n)
        made = make(case)
        exact, plain, floor = made.answers(gradients=True)
        assert_accurate(
            run(made.call, lane, made.dout, made.dlse),
            exact,
            plain,
            {k: 4 * x for k, x in floor.items()},
            f"{lane}: {case}",
        )


@pytest.mark.parametrize("name", ["distance_bias", "row_distance_bias", "col_distance_bias"])
def test_distances_that_nobody_sees(lane: Lane, name: str) -> None:
    """-inf beyond 3 keys either way: of a block of keys far from its queries, no score is finite, and of the last rows none at all."""
    call = Call(normal(1, 150, 2, 8), normal(1, 140, 2, 8), normal(1, 140, 2, 8), top_left=True)
    table = normal(*((2,) if name == "distance_bias" else (1, 2, 150 if name.startswith("row") else 140)), 2 * 150 + 1)
    table[..., :147] = table[..., 154:] = -math.inf
    setattr(call, name, table)
    compare(call, lane)


@pytest.mark.parametrize("packed", [False, True])
def test_no_query_and_keys_whose_heads_lie_apart(lane: Lane, packed: bool) -> None:
    k = normal(2, 4, 300, 64).transpose(1, 2)
    q, options = torch.empty(2, 0, 8, 64), {}
    if packed:
        q, k, options = q[0], k[0], {"cu_seqlens_q": int32(0, 0), "cu_seqlens_k": int32(0, 300)}
    found = run(Call(q, k, k, **options), lane)
    assert found["out"].numel() == 0 and found["lse"].numel() == 0
