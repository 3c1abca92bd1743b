"""Attention over parts of sequences on several processes, against the oracle on the whole sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import duplex_attn as da
import pytest
import torch
from duplex_attn.integrations.chunks import Division, add_by_distance, by_distance, chunks_of, steps
from duplex_attn.integrations.distributed import _Ring
from duplex_attn.ops import attention_backward

from ..cases import BFLOAT16, FLOAT16, MASKS, Case, problem
from ..lanes import Lane, on, on_own_stack
from ..oracle import assert_accurate, visible
from .ranks import Ranks

ROWS = 36  # a multiple of 2 * world, for each world below
SAME, MORE_KEYS, MORE_QUERIES = ((ROWS,) * 2,) * 2, ((ROWS,) * 2, (2 * ROWS,) * 2), ((2 * ROWS,) * 2, (ROWS,) * 2)
SHARDINGS = {"contiguous": 1, "balanced": 2}
BASE = Case(lengths=SAME, heads=(4, 2), head_dims=(16, 16))


def varied(**changes: object) -> Case:
    return dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]


CASES = {
    **{name: varied(mask=name) for name in MASKS},
    "prefix of a chunk": varied(mask=(6, None, 0)),
    "all of it a prefix": varied(mask=(ROWS, 2, 0)),
    "gap": varied(mask=(0, None, -3)),
    "gap behind": varied(mask=(0, -2, None)),
    "nothing": varied(mask=(0, None, -ROWS)),
    "only far": varied(mask=(0, 35, -20)),
    "one key": varied(mask=(0, 0, 0)),
    "a little ahead": varied(mask=(0, 0, 4)),
    "more keys": varied(lengths=MORE_KEYS, mask="causal"),
    "more keys, first aligned": varied(lengths=MORE_KEYS, mask="window_both", top_left=True),
    "more queries": varied(lengths=MORE_QUERIES, mask="prefix_each"),
    "more queries, first aligned": varied(lengths=MORE_QUERIES, mask="causal", top_left=True),
    "one head of keys": varied(heads=(3, 1), head_dims=(24, 8), mask="causal"),
    "heads of their own": varied(heads=(2, 2), mask="causal", lse_gradient=False),
    "bfloat16": varied(dtype=BFLOAT16, mask="causal"),
    "float16": varied(dtype=FLOAT16, mask="window_both"),
    "bfloat16, full": varied(dtype=BFLOAT16),
    "long": varied(lengths=((360,), (360,)), head_dims=(64, 64), mask="causal"),
    "scale and softcap": varied(mask="causal", scale=0.3, softcap=3.0),
    "sink": varied(mask="causal", sink="float32"),
    "sink of rows that see nothing": varied(mask=(0, None, -20), sink="float32"),
    "sink, bfloat16": varied(mask="window_back", sink="own", dtype=BFLOAT16),
    "alibi": varied(mask="causal", alibi=True),
    "alibi both ways": varied(alibi=True),
    "distances": varied(distance_radius=7),
    "one distance": varied(distance_radius=0, mask="causal"),
    "distances beyond all": varied(distance_radius=100, mask="prefix"),
    "distances, more keys": varied(distance_radius=7, lengths=MORE_KEYS, mask="causal"),
    "everything": varied(
        distance_radius=13, alibi=True, sink="float32", softcap=3.0, mask="prefix_each_and_window", dtype=FLOAT16
    ),
}


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def arguments(case: Case) -> dict[str, object]:
    made = problem(case)
    names = ("q", "k", "v", "prefix", "left", "right", "distance_bias", "alibi_slopes", "sink", "scale", "softcap")
    call = {name: getattr(made.call, name) for name in names}
    call["align"] = "top_left" if case.top_left else "bottom_right"
    return {"call": call, "dout": made.dout, "dlse": made.dlse}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", CASES)
def test_as_the_oracle_on_whole_sequences(ranks: Ranks, name: str, sharding: str) -> None:
    case = CASES[name]
    results = ranks.run("attend", sharding=sharding, **arguments(case))
    done = [result.pop("done") for result in results]
    for result in results:
        assert_accurate(result, *problem(case).answers(True), f"{ranks.world} ranks, {sharding}: {case}")
        assert result.keys() == problem(case).answers(True)[0].keys()

    if not isinstance(problem(case).call.prefix, torch.Tensor):
        seen = sum(pairs_seen(case, ranks.world * SHARDINGS[sharding]))
        assert sum(x.count("compute") for x in done) == 2 * seen  # forward and backward


def pairs_seen(case: Case, chunks: int) -> list[bool]:
    """Of each pair of chunks of queries and keys."""
    call = problem(case).call
    seen = visible(call, 0, call.q.shape[1], call.k.shape[1])
    return [bool(keys.any()) for rows in seen.tensor_split(chunks) for keys in rows.tensor_split(chunks, 1)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bits_repeat(ranks: Ranks, sharding: str) -> None:
    given = arguments(CASES["everything"])
    first, second = (ranks.run("attend", sharding=sharding, **given)[0] for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items() if isinstance(x, torch.Tensor))


def test_heads_first_in_memory(ranks: Ranks) -> None:
    case = CASES["prefix"]
    for result in ranks.run("attend", sharding="balanced", heads_first=True, **arguments(case)):
        del result["done"]
        assert_accurate(result, *problem(case).answers(True))


def test_sends_go_before_what_is_computed_meanwhile(ranks: Ranks) -> None:
    results = ranks.run("attend", sharding="contiguous", **arguments(CASES["full"]))
    hops = ranks.world - 1
    forward = ["send", "compute"] * hops + ["compute"]
    home = ["send"] if hops else []
    # keys, then the gradients of those before them
    backward = ["send", "compute", "send"] * hops + ["compute", *home]
    for result in results:
        assert result["done"] == [*forward, "backward", *backward]


@pytest.mark.parametrize(
    ("name", "sends"), [("window_back", 1), ("window_both", 2), ("one key", 0), ("a little ahead", 1), ("causal", 2)]
)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_keys_are_carried_to_where_they_are_seen(ranks: Ranks, name: str, sends: int, sharding: str) -> None:
    if sharding == "balanced" and name != "one key":
        sends = 2  # what lies beside the chunks of a rank is with both its neighbours
    sends = min(sends, ranks.world - 1)
    for result in ranks.run("attend", sharding=sharding, **arguments(CASES[name])):
        forward = result["done"][: result["done"].index("backward")]
        assert forward.count("send") == sends


def test_backward_keeps_nothing_of_other_ranks(ranks: Ranks) -> None:
    tensor = 16 * 2 * 8 * 4
    lse = 16 * 2 * 4
    assert ranks.run("saved_for_backward") == [4 * tensor + lse + 4] * ranks.world  # q, k, v, out; a prefix


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_what_was_sent_is_let_go(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.run("sent_and_still_held", dtype=dtype) == [[]] * ranks.world


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_memory_that_is_held(ranks: Ranks, dtype: torch.dtype, sharding: str) -> None:
    """In tensors like q in float32: the sums of the docstring, and five numbers of each row, whose head_dim is 8."""
    own, by_row, workspace = 1 if dtype == torch.float32 else 0.5, 5 / 8, 0 if dtype == torch.float32 else 1
    for forward, backward in ranks.run("most_memory", dtype=dtype, sharding=sharding):
        assert forward < 4 * own + 3 + own + by_row
        assert backward < 4 * own + 1 + 6 + 3 * own + workspace + by_row


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shard_and_unshard(ranks: Ranks, sharding: str, dtype: torch.dtype, dim: int) -> None:
    x = torch.arange(12 * 12 * 12).view(12, 12, 12) % 251
    x = x.to(dtype)
    chunks = x.chunk(ranks.world * SHARDINGS[sharding], dim)
    for rank, (part, whole) in enumerate(ranks.run("there_and_back", x=x, dim=dim, sharding=sharding)):
        own = [rank] if sharding == "contiguous" else [rank, 2 * ranks.world - 1 - rank]
        assert torch.equal(part, torch.cat([chunks[n] for n in own], dim))
        assert torch.equal(whole, x)


def test_a_group_of_some_ranks(ranks: Ranks) -> None:
    members = [0, 2] if ranks.world == 3 else [0]
    x = torch.full((1, 4 * len(members), 1, 8), 0.1).cumsum(1)
    expected = da.attention(x, x, x, da.causal())
    for rank, (out, error) in enumerate(ranks.answers("in_group", members=members)):
        if rank in members:
            torch.testing.assert_close(out, expected)
        else:
            assert error is not None and error.startswith("ValueError: group: expected one that has this rank")


@pytest.mark.parametrize("given", [{"dtype": torch.float64}, {"batch": 0}, {"rows": 0}])
def test_without_gradients(ranks: Ranks, given: dict) -> None:
    out = ranks.run("without_gradients", **{"dtype": torch.float32} | given)[0]
    assert out.shape == (given.get("batch", 1), given.get("rows", 4) * ranks.world, 2, 8)
    assert out.isfinite().all()


def test_float64_forward_is_exact(ranks: Ranks) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4 * ranks.world, 2, 8, generator=g).double() for _ in range(3))
    expected = da.attention(q, k, v, da.causal(), backend="reference")
    torch.testing.assert_close(ranks.run("without_gradients", dtype=torch.float64)[0], expected, rtol=1e-13, atol=1e-13)


def test_autocast(ranks: Ranks) -> None:
    for out, dq, _ in ranks.run("in_autocast"):
        assert (out, dq) == (torch.bfloat16, torch.float32)


def test_compiled_code_calls_it_as_it_is(ranks: Ranks) -> None:
    assert ranks.run("compiled") == [0.0] * ranks.world


def test_gradients_of_one_result_alone(ranks: Ranks) -> None:
    """Of lse, v has none."""
    _, _, dv = ranks.run("of_only", out_counts=False)[0]
    assert not dv.any()
    _, dk, dv = ranks.run("of_only", out_counts=True)[0]
    assert dk.any() and dv.any()


def test_no_gradient_on_one_rank(ranks: Ranks) -> None:
    """It still makes the exchanges that the others wait for."""
    for found, expected in zip(
        ranks.run("none_for_the_last", none=True), ranks.run("none_for_the_last", none=False), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize("where", ["attention_forward", "attention_backward"])
def test_a_rank_that_fails_midway_passes_on_what_others_wait_for(ranks: Ranks, where: str, at: str, error: str) -> None:
    """And the group can be used again, as the tests after this one do too."""
    number = 0 if at == "first" else 4 * ranks.world - 1  # two chunks of queries and two of keys in every step
    *others, last = ranks.run("fails_midway", where=where, at=number, error=error)
    expected = ranks.run("fails_midway", where=where, at=number, error=None)
    assert (last["error"], last.keys() & {"dq"}) == (error, set())
    for rank, (found, exact) in enumerate(zip(others, expected, strict=False)):
        for name in found.keys() & {"dk", "dv"}:
            if at == "first" or rank == 0:  # whose keys are with the last rank in its last step
                assert found.pop(name).isnan().all()
                del exact[name]
        torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_no_second_derivatives(ranks: Ranks) -> None:
    for _, error in ranks.answers("twice"):
        assert error is not None and error.startswith("RuntimeError: duplex_attn: attention has no second")


ZEROS = torch.zeros(1, 4, 2, 8)
REFUSED = {
    "three dimensions": ({"q": ZEROS[0]}, "ValueError: q: expected (batch, seqlen, heads, head_dim), got (4, 2, 8)"),
    "no tensor": ({"k": 3}, "TypeError: k: expected a tensor, got int"),
    "dtypes": ({"v": ZEROS.half()}, "TypeError: v: expected q's dtype torch.float32, got torch.float16"),
    "no heads": ({"k": torch.zeros(1, 4, 3, 8)}, "ValueError: k: expected heads_q (2) to be a multiple of heads_kv"),
    "odd rows": ({"q": ZEROS[:, :3]}, 'ValueError: q: expected an even number of rows with sharding="balanced", got 3'),
    "odd keys": (
        {"k": ZEROS[:, :3], "v": ZEROS[:, :3]},
        'ValueError: k: expected an even number of rows with sharding="balanced", got 3',
    ),
    "sharding": ({"sharding": "striped"}, 'ValueError: sharding: expected "balanced" or "contiguous", got striped'),
    "no mask": ({"mask": None}, "TypeError: mask: expected a Mask"),
    "alignment": ({"mask": da.Mask(align="middle")}, "ValueError: mask: expected align"),
    "half a prefix": ({"mask": da.prefix_lm(0.5)}, "TypeError: prefix: expected an int or an int32 tensor"),
    "prefixes": ({"mask": da.prefix_lm(torch.zeros(3, dtype=torch.int32))}, "ValueError: prefix: expected shape"),
    "window": ({"mask": da.sliding_window(2**31)}, "ValueError: left: expected a distance of at most"),
    "sink": ({"sink": torch.zeros(3)}, "ValueError: sink: expected shape (heads,) = (2,), got (3,)"),
    "slopes": ({"alibi_slopes": torch.zeros(3)}, "ValueError: alibi_slopes: expected shape (heads,) = (2,), got (3,)"),
    "even table": ({"distance_bias": torch.zeros(2, 4)}, "ValueError: distance_bias: expected shape (2, 2R + 1)"),
    "softcap": ({"softcap": -1.0}, "ValueError: softcap: expected 0 for none, or a positive finite number"),
    "scale": ({"scale": torch.ones(())}, "TypeError: scale: expected a float, got Tensor"),
    "backend": ({"backend": "metal"}, "ValueError: backend: expected one of"),
    "gradients of the reference": (
        {"backend": "reference", "gradients": True},
        "ValueError: backend: expected kernels, where gradients are wanted",
    ),
    "gradients in float64": (
        {name: ZEROS.double() for name in ("q", "k", "v")} | {"gradients": True},
        "ValueError: backend: expected kernels, where gradients are wanted",
    ),
    "dropout": ({"dropout_p": 0.1}, "TypeError: context_parallel_attention() got an unexpected keyword argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(ranks: Ranks, name: str) -> None:
    given, message = REFUSED[name]
    for _, error in ranks.answers("call", **given):
        assert error is not None and error.startswith(message), error


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "dropout"])
def test_bad_input_on_one_rank(ranks: Ranks, name: str) -> None:
    """All raise what it raises, before anything is sent."""
    given, message = REFUSED[name]
    last = {name: x for name, x in given.items() if name != "gradients"}
    where = f" on rank {ranks.world - 1}" if ranks.world > 1 else ""
    for _, error in ranks.answers("call", last=last, gradients="gradients" in given):
        assert error is not None and error.startswith(message), error
        assert error.splitlines()[0].endswith(where), error


def test_no_tensors_on_one_rank(ranks: Ranks) -> None:
    for _, error in ranks.answers("call", last=dict.fromkeys("qkv")):
        assert error is not None and error.startswith("TypeError: q: expected a tensor, got NoneType"), error


def test_agreement_is_one_small_all_gather(ranks: Ranks) -> None:
    assert ranks.run("collectives_of_a_call") == [[(16,)]] * ranks.world


UNLIKE = {
    "rows": ({"q": torch.zeros(1, 6, 2, 8)}, "q: expected the same on every rank, ((1, 4, 2, 8), 'torch.float32')"),
    "keys": ({"k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)}, "k: expected the same on every rank"),
    "dtypes": ({n: ZEROS.half() for n in ("q", "k", "v")}, "q: expected the same on every rank"),
    "masks": ({"mask": da.causal()}, "mask: expected the same on every rank, (0, None, None, 'bottom_right')"),
    "prefixes": ({"mask": da.Mask(torch.ones(1, dtype=torch.int32))}, "mask: expected the same on every rank"),
    "shardings": ({"sharding": "contiguous"}, "sharding: expected the same on every rank, balanced as on rank 0"),
    "scales": ({"scale": 0.3}, "scale: expected the same on every rank, None as on rank 0, got 0.3 on rank"),
    "sinks": ({"sink": torch.zeros(2)}, "sink: expected the same on every rank, None as on rank 0"),
    "gradients": ({"q": torch.zeros(1, 4, 2, 8, requires_grad=True)}, "requires_grad: expected the same on every rank"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_ranks_that_are_called_unlike_each_other(ranks: Ranks, name: str) -> None:
    last, message = UNLIKE[name]
    for _, error in ranks.answers("call", last=last):
        if ranks.world == 1:
            assert error is None
        else:
            assert error is not None and error.startswith(f"ValueError: {message}"), error


def test_parts_that_do_not_fit(ranks: Ranks) -> None:
    for sharding, chunks in SHARDINGS.items():
        for _, error in ranks.answers("cut", rows=12 * ranks.world + 1, sharding=sharding):
            if chunks * ranks.world > 1:
                assert error.startswith(f"ValueError: x: expected a multiple of {chunks * ranks.world} rows"), error
    for _, error in ranks.answers("gather", x=torch.zeros(1, 6, 2)):
        assert ranks.world == 1 or error.startswith("ValueError: x: expected the same on every rank"), error


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"x": None}, "TypeError: x: expected a tensor, got NoneType"),
        ({"x": torch.zeros(1, 3, 2)}, "ValueError: x: expected an even number of rows"),
        ({"dim": 3}, "IndexError: "),
    ],
)
def test_bad_parts_on_one_rank(ranks: Ranks, last: dict, message: str) -> None:
    for _, error in ranks.answers("gather", **last):
        assert error is not None and error.startswith(message), error


def test_ranks_that_make_different_calls(ranks: Ranks) -> None:
    for _, error in ranks.answers("another_call_on_the_last"):
        assert ranks.world == 1 or error.startswith("ValueError: call: expected the same on every rank"), error


def test_without_a_group() -> None:
    from duplex_attn.integrations.distributed import context_parallel_attention

    with pytest.raises(ValueError, match="init_process_group"):
        context_parallel_attention(ZEROS, ZEROS, ZEROS)


def check_parts(lane: Lane, dtype: torch.dtype) -> None:
    """What the ring asks of kernels: gradients of a part of the keys from out and lse of all, and spans at any offset."""
    case = varied(
        lengths=((40,) * 2, (40,) * 2), mask="prefix_each_and_window", distance_radius=7, softcap=3.0, dtype=dtype
    )
    made = problem(case)
    moved = {name: on(getattr(made.call, name), lane.device) for name in ("q", "k", "v", "prefix", "distance_bias")}
    q, k, v, prefix, bias = moved.values()
    exact = made.answers(True)[0]
    out, lse = exact["out"].to(lane.device, dtype), exact["lse"].to(lane.device, torch.float32)
    dout, dlse = on(made.dout, lane.device), on(made.dlse, lane.device)
    bias = bias.float()
    dq, dk, dv, dtable = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v, bias))

    division = Division(1, 2, 20, 20, 0, None, made.call.left, made.call.right)
    ring = _Ring(None, division, (None, 3.0, 0.0, None, True, False), lane.backend)
    wanted = [True, True, True, False, True, False, False, False]
    for part in division.parts(0, 0):
        of_rows = dout[:, part.rows], dlse[..., part.rows], out[:, part.rows], lse[..., part.rows]
        call = ring.call(part, q, k, v, prefix, bias, None)
        grads = attention_backward(*of_rows, *call, wanted, lane.backend)
        dq[:, part.rows] += grads[0]
        dk[:, part.keys] += grads[1]
        dv[:, part.keys] += grads[2]
        add_by_distance(dtable, grads[4], part.shift)
    found = {"dq": dq, "dk": dk, "dv": dv, "ddistance_bias": dtable}
    assert_accurate(found, *made.answers(True), f"{lane}: {case}")


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_parts_on_each_backend(lane: Lane, dtype: torch.dtype) -> None:
    if lane.backend == "reference":
        pytest.skip("makes an lse of its own, and is refused")
    on_own_stack(lane, lambda: check_parts(lane, dtype))


def test_parts_on_the_emulated_machine(emulated: Lane) -> None:
    check_parts(emulated, BFLOAT16)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_visible_pair_is_in_one_part(world: int, chunks: int) -> None:
    """Every window, prefix and offset in small: the parts of all ranks and steps, put together, are the mask."""
    rows, keys = 2, 3
    total_q, total_k = rows * chunks * world, keys * chunks * world
    reaches = [None, -4, -1, 0, 1, 5, total_k]
    for prefix, left, right, first in [
        (p, l, r, f) for p in (0, 1, 4, total_k) for l in reaches for r in reaches for f in (0, total_k - total_q)
    ]:
        i, j = torch.arange(total_q)[:, None] + first, torch.arange(total_k)[None]
        expected = (j < prefix) | (
            torch.full((total_q, total_k), True)
            & ((j >= i - left) if left is not None else True)
            & ((j <= i + right) if right is not None else True)
        )
        found = torch.zeros(total_q, total_k, dtype=torch.int)
        division = Division(world, chunks, rows, keys, first, prefix, left, right)
        for rank in range(world):
            for step in steps(division):
                for part in division.parts(rank, step):
                    a = chunks_of(rank, world, chunks)[part.chunk] * rows
                    b = part.first_key
                    assert part.shift == a + first - b
                    ii, jj = torch.arange(rows)[:, None], torch.arange(keys)[None]
                    seen = (jj >= ii - part.left) if part.left is not None else torch.ones(rows, keys, dtype=torch.bool)
                    seen = seen & ((jj <= ii + part.right) if part.right is not None else True) | (jj < part.prefix)
                    assert seen.any()
                    found[a : a + rows, b : b + keys] += seen
        assert torch.equal(found, expected.int()), division


@pytest.mark.parametrize("radius", [0, 1, 4, 30])
@pytest.mark.parametrize("reach", [0, 1, 6])
def test_tables_by_distance_and_back(radius: int, reach: int) -> None:
    for shift in range(-12, 13):
        table = torch.randn(2, 2 * radius + 1, dtype=torch.float64, requires_grad=True)
        slopes = torch.tensor([0.5, 2.0], dtype=torch.float64)
        local = by_distance(shift, reach, table, slopes)
        distances = torch.arange(-reach, reach + 1) - shift
        expected = torch.stack(
            [table[:, min(max(int(d), -radius), radius) + radius] - slopes * abs(d) for d in distances], 1
        )
        assert torch.equal(local, expected)
        weights = torch.randn_like(local)
        (wanted,) = torch.autograd.grad(expected, table, weights)
        total = torch.zeros_like(wanted)
        add_by_distance(total, weights, shift)
        torch.testing.assert_close(total, wanted)
