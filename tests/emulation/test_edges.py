"""Sizes of nothing, values at the ends of their range, and bits that stay the same whatever the order of events."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ..cases import Case, make
from ..lanes import Lane, run
from ..oracle import Call, answer, assert_accurate, floors
from .library import EMULATED_ONLY, draw

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
BF16 = torch.bfloat16


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compare(call: Call, lane: Lane) -> None:
    exact, plain = answer(call, torch.float64), answer(call, call.q.dtype)
    assert_accurate(run(call, lane), exact, plain, floors(call, exact), str(lane))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("batch", "len_q", "len_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 0, 0)])
def test_dense_without_rows(kernels: Lane, batch: int, len_q: int, len_k: int, sink: bool) -> None:
    call = Call(normal(batch, len_q, 4, 8), normal(batch, len_k, 2, 8), normal(batch, len_k, 2, 16), right=0)
    call.sink = normal(4, dtype=torch.float32) if sink else None
    compare(call, kernels)


@pytest.mark.parametrize(
    ("rows_q", "rows_k", "cu"), [(0, 0, [0]), (0, 0, [0, 0, 0]), (4, 4, [0]), (4, 4, [0, 0]), (3, 0, [0, 0, 0])]
)
def test_packed_without_rows(kernels: Lane, rows_q: int, rows_k: int, cu: list[int]) -> None:
    compare(Call(normal(rows_q, 2, 8), normal(rows_k, 2, 8), normal(rows_k, 2, 8), int32(*cu), int32(*cu)), kernels)


@pytest.mark.parametrize("scale", [0.25, -0.25, 0.0])
def test_scores_far_beyond_what_exp_holds(kernels: Lane, scale: float) -> None:
    q, k, v = 20 * normal(1, 20, 2, 16), 20 * normal(1, 300, 2, 16), normal(1, 300, 2, 16)
    compare(Call(q, k, v, scale=scale), kernels)


def test_scores_that_only_grow_and_only_shrink(kernels: Lane) -> None:
    for slope in (1.0, -1.0):
        k = slope * torch.arange(400.0)[None, :, None, None].expand(1, 400, 1, 8).contiguous() / 8
        compare(Call(torch.ones(1, 3, 1, 8, dtype=BF16), k.to(BF16), normal(1, 400, 1, 8), scale=1.0), kernels)


@pytest.mark.parametrize("sink", [60.0, -60.0, 1e4, -1e4, -float("inf")])
def test_sinks_that_take_all_or_nothing(kernels: Lane, sink: float) -> None:
    call = Call(normal(1, 5, 2, 8), normal(1, 70, 2, 8), normal(1, 70, 2, 8), sink=torch.tensor([sink, 0.0]))
    compare(call, kernels)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(12, 12), (7, 16), (100, 97), (1, 250)])
def test_rows_that_end_within_16_bytes(kernels: Lane, head_dim: int, head_dim_v: int) -> None:
    """What lies behind them is not read: NaN here, and perhaps the end of the memory."""
    rows = [torch.full((2, 70, 2, 256), float("nan"), dtype=BF16) for _ in range(3)]
    q, k, v = (x[..., :d] for x, d in zip(rows, (head_dim, head_dim, head_dim_v), strict=True))
    for n, x in enumerate((q, k, v)):
        x.copy_(normal(*x.shape[:3], n + 1, dtype=BF16)[..., :1] + normal(*x.shape))
    compare(Call(q, k, v, right=0), kernels)


LONG = Case("packed", ((300, 10, 150), (300, 200, 150)), (4, 2), (64, 64), BF16, mask="prefix_each", softcap=3.0)


@EMULATED_ONLY
@pytest.mark.parametrize("case", [LONG, dataclasses.replace(LONG, head_dims=(128, 128), softcap=0.0)], ids=str)
def test_same_bits_in_every_order_on_any_card(kernels: Lane, case: Case) -> None:
    made = make(case)
    kept: set[bytes] = set()
    for seed in range(8):
        draw(seed, processors=(1, 2, 3, 132)[seed % 4])
        kept.add(b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in run(made.call, kernels).values()))
    assert len(kept) == 1


def test_a_sequence_does_not_feel_its_batch(kernels: Lane) -> None:
    made = make(LONG)
    whole = run(made.call, kernels, batch_invariant=True)
    q, k, v = (x[300:310] if x is made.call.q else x[300:500] for x in (made.call.q, made.call.k, made.call.v))
    alone = dataclasses.replace(
        made.call, q=q, k=k, v=v, cu_seqlens_q=int32(0, 10), cu_seqlens_k=int32(0, 200), prefix=made.call.prefix[1:2]
    )
    got = run(alone, kernels, batch_invariant=True)
    assert torch.equal(got["out"], whole["out"][300:310]) and torch.equal(got["lse"], whole["lse"][:, 300:310])


@EMULATED_ONLY
def test_lengths_that_lie_reach_no_further_than_the_tensors(kernels: Lane) -> None:
    """Beside the operator, which checks contents on the CPU: past their tensors, lengths mean all that is stored."""
    q, k, v = normal(2, 20, 2, 8), normal(2, 30, 1, 8), normal(2, 30, 1, 8)
    far = int32(10_000, 2**31 - 1)
    draw(0)
    got = torch.ops.duplex_attn_cuda.attention_forward(
        q, k, v, None, None, 20, 30, far, far, int32(0, -5), int32(-1, 0), far, None, 0, False,
        None, None, None, None, None, None, None, 0.0, 0.0, None, False, False,
    )  # fmt: skip
    whole = run(Call(q, k, v), kernels)
    assert torch.equal(got[0], whole["out"]) and torch.equal(got[1], whole["lse"])
