"""The gradient of distance_bias: by its formula, entry by entry, what runs with it, and the memory that it takes on its way."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from duplex_attn.call import GRADIENTS
from duplex_attn.ops import attention_backward, attention_forward
from torch import Tensor

from ..cases import Case, Problem
from ..cases import make as made_of
from ..lanes import Lane, run
from ..oracle import Answer, Call, positions, scores, sequences
from .library import EMULATED_ONLY, compiler, draw, functions

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
BF16, FLOAT16 = torch.bfloat16, torch.float16


def make(case: Case) -> Problem:
    """With a bias in float32, so that its gradient is not rounded."""
    made = made_of(case)
    assert made.call.distance_bias is not None
    made.call.distance_bias = made.call.distance_bias.float()
    return made


def by_formula(call: Call, got: Answer, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    """From the outputs that the kernels gave, in float64; and the sum of what was added, without its signs. The accuracy contract
    is of sums over rows and would let many of them go."""
    exact, packed = call.with_grad(torch.float64), call.cu_seqlens_q is not None
    assert exact.distance_bias is not None
    found, sizes = (torch.zeros(exact.distance_bias.shape, dtype=torch.float64) for _ in range(2))
    radius, group = found.shape[1] // 2, call.heads_q // call.k.shape[-2]
    for seq in sequences(call):
        index = torch.arange(seq.len_k)[None, :] - positions(call, seq.len_q, seq.len_k)
        index = (index.clamp(-radius, radius) + radius).flatten()
        for head in range(call.heads_q):
            of_rows = (head, seq.q[0]) if packed else (seq.q[0], head, seq.q[1])
            do, o = (x.cpu().double()[seq.q][:, head] for x in (dout, got["out"]))
            delta = (do * o).sum(-1) - (0 if dlse is None else dlse.cpu().double()[of_rows])
            p = torch.exp(scores(exact, seq, head) - got["lse"].cpu().double()[of_rows][:, None]).detach()
            ds = p * (do @ exact.v[seq.k][:, head // group].detach().T - delta[:, None])
            ds = torch.where(p > 0, ds, 0).flatten()  # a row that sees nothing gives NaN
            found[head].index_add_(0, index, ds)
            sizes[head].index_add_(0, index, ds.abs())
    return found, sizes


def assert_right(made: Problem, got: Answer) -> None:
    want, sizes = by_formula(made.call, got, made.dout, made.dlse)
    wrong = (got["ddistance_bias"].cpu().double() - want).abs() > 1e-4 * sizes + 1e-5
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {torch.nonzero(wrong)[0].tolist()}"


CASES = [
    Case("dense", ((150,), (290,)), (2, 1), (64, 64), BF16, distance_radius=0),
    Case("dense", ((270,), (300,)), (2, 2), (64, 64), BF16, distance_radius=5, top_left=True),  # blocks beyond both ends
    Case("dense", ((300,), (300,)), (1, 1), (64, 64), BF16, distance_radius=66, top_left=True),  # all but a corner beyond
    Case("packed_with_tail", ((150, 0, 70, 1), (150, 20, 300, 40)), (4, 2), (128, 128), FLOAT16, "causal", distance_radius=64),
    Case("padded_anywhere_by_8", ((130, 70), (200, 90)), (2, 1), (192, 192), BF16, "prefix_each", distance_radius=400),
    Case("packed", ((20, 140), (200, 130)), (2, 1), (256, 256), BF16, "prefix_each_and_window", softcap=3.0, distance_radius=31, alibi=True, sink="own"),
    Case("dense_sliced_by_8", ((100,), (420,)), (2, 2), (96, 40), BF16, "only_ahead", distance_radius=127, lse_gradient=False),
    Case("packed", "long_queries", (4, 2), (64, 64), BF16, "causal", distance_radius=7),  # rows that see nothing
]  # fmt: skip


LITTLE = ctypes.c_int64(2 * 2**20)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_entry(kernels: Lane, case: Case) -> None:
    made = make(case)
    if kernels.device == "cpu":
        draw(len(case.layout), processors=3)
    assert_right(made, run(made.call, kernels, made.dout, made.dlse))
    made.guard.assert_untouched()


MANY = Case("packed_with_tail", ((150, 40, 130, 20), (150, 90, 130, 20)), (2, 1), (64, 64), BF16, distance_radius=40)


@EMULATED_ONLY
@pytest.mark.parametrize("case", [MANY, dataclasses.replace(MANY, head_dims=(128, 128), softcap=3.0)], ids=str)
def test_bits_follow_from_the_number_of_processors_alone(kernels: Lane, case: Case) -> None:
    """In any order of events; and what comes with this gradient is what comes without."""
    made, kept = make(case), {}
    for seed in range(4):
        draw(seed, processors=1 + seed % 2)
        got = run(made.call, kernels, made.dout, made.dlse)
        assert torch.equal(got["ddistance_bias"], kept.setdefault(seed % 2, got["ddistance_bias"]))
    assert_right(made, got)
    without = run(made.call, kernels, made.dout, made.dlse, constants=("distance_bias",))
    assert all(torch.equal(x, got[name]) for name, x in without.items())


@EMULATED_ONLY
def test_no_warp_runs_ahead_of_its_team(kernels: Lane) -> None:
    """Many blocks of keys one after the other: what others still read is not overwritten for the next."""
    made = make(Case("packed", ((64,) * 3, (600,) * 3), (1, 1), (64, 64), BF16, distance_radius=599))
    first: Tensor | None = None
    for seed in range(24):
        draw(seed, processors=1)
        got = run(made.call, kernels, made.dout, made.dlse)["ddistance_bias"]
        first = got if first is None else first
        assert torch.equal(got, first), seed


@EMULATED_ONLY
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_it_alone_is_wanted(kernels: Lane, softcap: float) -> None:
    made = make(Case("dense", ((70,), (130,)), (2, 1), (64, 64), BF16, softcap=softcap, distance_radius=9))
    c = made.call
    call = [
        c.q, c.k, c.v, None, None, 70, 130, None, None, None, None, None, None, None, False,
        None, c.distance_bias, None, None, None, None, None, softcap, 0.0, None, False, False,
    ]  # fmt: skip
    draw(0)
    out, lse = attention_forward(*call, "cuda")
    wanted = [name == "distance_bias" for name in GRADIENTS]
    grads = attention_backward(made.dout, made.dlse, out, lse, *call, wanted, "cuda")
    assert [x.numel() > 0 for x in grads] == wanted
    assert_right(made, {"out": out, "lse": lse, "ddistance_bias": grads[GRADIENTS.index("distance_bias")]})


@pytest.mark.parametrize(("batch", "len_q", "len_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_of_nothing_it_is_zero(kernels: Lane, batch: int, len_q: int, len_k: int) -> None:
    q, k = torch.zeros(batch, len_q, 2, 8, dtype=BF16), torch.zeros(batch, len_k, 2, 8, dtype=BF16)
    got = run(Call(q, k, k, distance_bias=torch.zeros(2, 7)), kernels, q)
    assert torch.equal(got["ddistance_bias"].cpu(), torch.zeros(2, 7))


@EMULATED_ONLY
def test_heads_in_several_launches(kernels: Lane) -> None:
    """64 of them, two slots for each tile, do not fit at once."""
    case = Case("dense", ((5,), (600,)), (64, 1), (8, 8), BF16, "window_back", distance_radius=700)
    floats = ctypes.c_int64()
    assert functions().distance_heads_of(ctypes.c_int64(64), 64, 64, 700, 600, LITTLE, ctypes.byref(floats)) < 64
    made = make(case)
    draw(0, processors=64)
    assert_right(made, run(made.call, kernels, made.dout, made.dlse))


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("most", [2 * 2**20, 32 * 2**20])
def test_memory_on_the_way(most: int) -> None:
    """Such a part of the call's tensors, or two tables a processor: never more, however many the heads, however long the bias."""
    floats = ctypes.c_int64()
    for processors in (1, 108, 132):
        for heads, radius, length in [
            (12, 128, 1024),
            (64, 16384, 16384),
            (64, 2**20, 16384),
            (1, 0, 10**6),
            (512, 64, 131072),
        ]:
            tiles = heads * -(-length // 128)
            at_once = functions().distance_heads_of(
                ctypes.c_int64(tiles), processors, heads, radius, length, ctypes.c_int64(most), ctypes.byref(floats)
            )
            table = 2 * min(processors, tiles) * (2 * min(radius, length) + 1)  # of one head
            assert 1 <= at_once <= heads and floats.value == at_once * table
            assert 4 * floats.value <= max(most, 4 * table)
            assert at_once == heads or 4 * table * (at_once + 1) > most, "launches for nothing"
