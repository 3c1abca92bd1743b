"""Sizes of nothing, values at the ends of their range, and bits that stay the same whatever the order of events."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ..cases import Case, make
from ..lanes import Lane, run
from ..oracle import GRADIENTS, Call, answer, assert_accurate, floors
from .library import EMULATED_ONLY, draw

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
BF16 = torch.bfloat16


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compare(call: Call, lane: Lane, dout: Tensor | None = None) -> None:
    """Outputs and gradients, whose sums may be in a fixed order or in any."""
    dout = normal(*call.q.shape[:-1], call.v.shape[-1]) if dout is None else dout
    exact, plain = answer(call, torch.float64, dout), answer(call, call.q.dtype, dout)
    for deterministic in (True, False):
        got = run(call, lane, dout, deterministic=deterministic)
        assert_accurate(got, exact, plain, floors(call, exact, dout), f"{lane}, {deterministic}, {dout.stride()}")


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


def test_packed_keys_that_are_of_no_sequence(kernels: Lane) -> None:
    q, k = normal(3, 2, 8), normal(4, 2, 8)
    compare(Call(q, k, k.clone(), int32(0, 3), int32(0, 0)), kernels)


@pytest.mark.parametrize("scale", [0.25, -0.25, 0.0])
def test_scores_far_beyond_what_exp_holds(kernels: Lane, scale: float) -> None:
    q, k, v = 20 * normal(1, 20, 2, 16), 20 * normal(1, 300, 2, 16), normal(1, 300, 2, 16)
    compare(Call(q, k, v, scale=scale), kernels)


@pytest.mark.parametrize("keys", [70, 128, 129])
def test_scores_far_below_zero(kernels: Lane, keys: int) -> None:
    """exp(0 - lse) is more than float32 holds: nothing may come of what lies in a tile behind the last key."""
    q, k, v = 1 + normal(1, 70, 2, 16) / 8, normal(1, keys, 1, 16) / 8 - 1, normal(1, keys, 1, 16)
    compare(Call(q, k, v, scale=20.0), kernels)


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


SHORTER = dataclasses.replace(LONG, lengths=((140, 10), (140, 200)), heads=(2, 1), sink="float32")


@EMULATED_ONLY
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_same_bits_of_gradients_in_every_order_on_any_card(kernels: Lane, head_dim: int) -> None:
    made = make(dataclasses.replace(SHORTER, head_dims=(head_dim, head_dim), softcap=3.0 * (head_dim == 64)))
    runs = []
    for seed in range(6):
        draw(seed, processors=(1, 2, 3, 132)[seed % 4])
        runs.append(run(made.call, kernels, made.dout, made.dlse, deterministic=True))
    assert {"dq", "dk", "dv", "dsink"} <= runs[0].keys()
    for other in runs[1:]:
        assert all(torch.equal(x, other[name]) for name, x in runs[0].items())


MANY = Case("packed", ((40,) * 12, (70,) * 12), (2, 1), (128, 128), BF16)


@EMULATED_ONLY
def test_tiles_that_follow_one_another_in_a_block(kernels: Lane) -> None:
    """Many for each block of the grid: what warps still read of one is not overwritten for the next."""
    made = make(MANY)
    exact, plain, floor = made.answers(gradients=True)
    for seed in range(2):
        draw(seed, processors=1)
        got = run(made.call, kernels, made.dout, made.dlse, deterministic=seed == 0)
        assert_accurate(got, exact, plain, floor, str(seed))


def test_a_sequence_does_not_feel_its_batch(kernels: Lane) -> None:
    made = make(LONG)
    whole = run(made.call, kernels, batch_invariant=True)
    q, k, v = (x[300:310] if x is made.call.q else x[300:500] for x in (made.call.q, made.call.k, made.call.v))
    alone = dataclasses.replace(
        made.call, q=q, k=k, v=v, cu_seqlens_q=int32(0, 10), cu_seqlens_k=int32(0, 200), prefix=made.call.prefix[1:2]
    )
    got = run(alone, kernels, batch_invariant=True)
    assert torch.equal(got["out"], whole["out"][300:310]) and torch.equal(got["lse"], whole["lse"][:, 300:310])


def test_the_gradient_of_a_sink_is_of_every_row(kernels: Lane) -> None:
    """By its formula from what the forward gave: the accuracy contract, of sums over rows, would let a few of them go."""
    made = make(dataclasses.replace(LONG, lengths=((300, 10, 150), (20, 10, 30)), sink="float32", softcap=0.0))
    got = {name: x.cpu().float() for name, x in run(made.call, kernels, made.dout, made.dlse).items()}
    assert made.dlse is not None and made.call.sink is not None
    delta = (made.dout.float() * got["out"]).sum(-1).T - made.dlse  # (heads, rows)
    want = -(torch.exp(made.call.sink[:, None] - got["lse"]) * delta).sum(1)
    torch.testing.assert_close(got["dsink"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_rows_that_see_nothing_beside_rows_that_do(kernels: Lane, softcap: float) -> None:
    """Where a block is an edge, their log-sum-exp of -inf must weigh nothing, and no gradient become NaN."""
    case = Case("packed", "long_queries", (4, 2), (64, 64), BF16, mask="causal", softcap=softcap)
    made = make(case)
    exact, plain, floor = made.answers(gradients=True)
    for deterministic in (True, False):
        got = run(made.call, kernels, made.dout, made.dlse, deterministic=deterministic)
        assert_accurate(got, exact, plain, floor, str(case))
        assert (got["lse"] == -torch.inf).any() and (got["dq"][0] == 0).all()


def test_gradients_in_strides_that_bulk_copies_cannot_read(kernels: Lane) -> None:
    """As sum() gives them, one row for all, columns that are no neighbours, rows off 16 bytes; and of values that wide."""
    q, k = normal(2, 70, 2, 40), normal(2, 90, 1, 40)
    v = normal(2, 90, 1, 24)[..., :20]
    for dout in (
        torch.ones(1, dtype=BF16).expand(2, 70, 2, 20),
        normal(1, 1, 1, 20).expand(2, 70, 2, 20),
        normal(2, 70, 2, 40)[..., ::2],
        normal(2, 70, 2, 23)[..., 3:],
        normal(2, 2, 20, 70).permute(0, 3, 1, 2),
    ):
        compare(Call(q, k, v, right=0), kernels, dout)


@EMULATED_ONLY
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("sink",), ("k", "sink"), ()])
def test_gradients_that_are_wanted_and_no_others(kernels: Lane, wanted: tuple[str, ...]) -> None:
    q, k, v, sink = normal(1, 70, 2, 8), normal(1, 70, 2, 8), normal(1, 70, 2, 8), normal(2, dtype=torch.float32)
    call = (
        q, k, v, None, None, 70, 70, None, None, None, None, None, None, None, False,
        None, None, None, None, None, sink, None, 0.0, 0.0, None, True, False,
    )  # fmt: skip
    out, lse = torch.ops.duplex_attn_cuda.attention_forward(*call)
    dout, bit = normal(1, 70, 2, 8), [1, 2, 4, 0, 0, 0, 0, 128]
    every = torch.ops.duplex_attn_cuda.attention_backward(dout, None, out, lse, *call, sum(bit))
    mask = sum(b for b, name in zip(bit, GRADIENTS, strict=True) if name in wanted)
    got = torch.ops.duplex_attn_cuda.attention_backward(dout, None, out, lse, *call, mask)
    for name, x, whole in zip(GRADIENTS, got, every, strict=True):
        assert torch.equal(x, whole if name in wanted else torch.empty(0))


@EMULATED_ONLY
@pytest.mark.parametrize("deterministic", [True, False])
def test_lengths_that_lie_reach_no_further_than_the_tensors(kernels: Lane, deterministic: bool) -> None:
    """Beside the operator, which checks contents on the CPU: past their tensors, lengths mean all that is stored. One tile
    of keys adds to dq, so that its bits are the same in any order."""
    q, k, v = normal(2, 20, 2, 8), normal(2, 30, 1, 8), normal(2, 30, 1, 8)
    far = int32(10_000, 2**31 - 1)
    draw(0)
    call = (
        q, k, v, None, None, 20, 30, far, far, int32(0, -5), int32(-1, 0), far, None, 0, False,
        None, None, None, None, None, None, None, 0.0, 0.0, None, deterministic, False,
    )  # fmt: skip
    got = torch.ops.duplex_attn_cuda.attention_forward(*call)
    dout = normal(2, 20, 2, 8)
    whole = run(Call(q, k, v), kernels, dout, deterministic=deterministic)
    assert torch.equal(got[0], whole["out"]) and torch.equal(got[1], whole["lse"])
    grads = torch.ops.duplex_attn_cuda.attention_backward(dout, None, *got, *call, 7)
    assert all(torch.equal(x, whole[f"d{name}"]) for x, name in zip(grads, "qkv", strict=False))
