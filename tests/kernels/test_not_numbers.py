"""NaN and infinity, where they take part, come out as what the formula makes of them: never as a row that saw nothing."""

from __future__ import annotations

import math

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from ..cases import BFLOAT16, FLOAT16, FLOAT32
from ..lanes import Lane, on, on_own_stack

ROWS, KEYS, DIM = 5, 40, 32
BAD = [math.nan, math.inf, -math.inf]


def qkv(dtype: torch.dtype, lane: Lane) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, ROWS, 2, DIM), (1, KEYS, 1, DIM), (1, KEYS, 1, DIM))
    return [on(torch.randn(shape, generator=g).to(dtype), lane.device) for shape in shapes]


def attend(lane: Lane, q: Tensor, k: Tensor, v: Tensor, mask: da.Mask, **terms: object) -> tuple[Tensor, Tensor]:
    out, lse = on_own_stack(lane, lambda: da.attention(q, k, v, mask, return_lse=True, backend=lane.backend, **terms))
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bad", BAD)
def test_a_row_of_queries(lane: Lane, dtype: torch.dtype, bad: float) -> None:
    """Infinity times numbers of both signs is NaN too."""
    q, k, v = qkv(dtype, lane)
    q[0, 2, 1] = bad
    out, lse = attend(lane, q, k, v, da.full())
    wrong = torch.zeros(1, ROWS, 2, dtype=torch.bool)
    wrong[0, 2, 1] = True
    assert out[wrong].isnan().all() and out[~wrong].isfinite().all()
    assert torch.equal(lse.isnan().mT, wrong) and lse.mT[~wrong].isfinite().all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("sink", [False, True])
def test_the_only_key_of_a_row(lane: Lane, dtype: torch.dtype, bad: float, sink: bool) -> None:
    """Row 0 sees key 0 and no other, the last one every key."""
    q, k, v = qkv(dtype, lane)
    k[0, 0] = bad
    terms = {"sink": on(torch.ones(2), lane.device)} if sink else {}
    out, lse = attend(lane, q, k, v, da.Mask(right=0, align="top_left"), **terms)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mask", [da.full(), da.causal()], ids=["full", "causal"])
def test_a_value(lane: Lane, dtype: torch.dtype, bad: float, mask: da.Mask) -> None:
    """Of key 0, which every row sees: infinity times a probability stays infinity."""
    q, k, v = qkv(dtype, lane)
    v[0, 0, 0, 3] = bad
    out, lse = attend(lane, q, k, v, mask)
    assert lse.isfinite().all()
    column = torch.full((1, ROWS, 2), bad, dtype=dtype)
    torch.testing.assert_close(out[..., 3], column, equal_nan=True)
    assert out[..., :3].isfinite().all() and out[..., 4:].isfinite().all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_a_bias(lane: Lane, dtype: torch.dtype) -> None:
    if lane.backend == "cuda":
        pytest.skip("it has no bias")
    q, k, v = qkv(dtype, lane)
    bias = torch.zeros(1, 2, ROWS, KEYS, dtype=dtype)
    bias[0, 0, 1] = math.nan
    bias[0, 1, 3] = -math.inf
    out, lse = attend(lane, q, k, v, da.full(), bias=on(bias, lane.device))
    assert out[0, 1, 0].isnan().all() and lse[0, 0, 1].isnan()
    assert (out[0, 3, 1] == 0).all() and lse[0, 1, 3] == -math.inf
    assert int(out.isnan().sum()) == DIM and int(lse.isfinite().sum()) == 2 * ROWS - 2


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("keys", [KEYS, 300])
def test_rows_masked_by_the_lowest_number(lane: Lane, dtype: torch.dtype, keys: int) -> None:
    """As additive masks have it: a row of it all is the mean of the values, and its gradients stay finite."""
    if lane.backend == "cuda":
        pytest.skip("it has no bias")
    q, k, v = (x.clone() for x in qkv(dtype, lane))
    k, v = (x.repeat(1, -(-keys // KEYS), 1, 1)[:, :keys].requires_grad_() for x in (k, v))
    lowest = torch.finfo(dtype).min
    bias = torch.zeros(1, 1, ROWS, keys, dtype=dtype)
    bias[0, 0, 0] = lowest
    bias[0, 0, 1, : keys - 3] = lowest  # finite scores come last
    bias[0, 0, 2, 3:] = lowest
    q = q.requires_grad_()
    bias = on(bias, lane.device)

    def work() -> Tensor:
        out = da.attention(q, k, v, bias=bias, backend=lane.backend)
        out.float().square().sum().backward()
        return out

    out = on_own_stack(lane, work).detach().cpu().float()
    few = da.attention(*(x.detach().cpu() for x in (q, k[:, -3:], v[:, -3:])), backend="reference").float()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out[0, 0], v.detach().cpu().float()[0].mean(0).expand(2, -1), atol=8 * eps, rtol=0)
    torch.testing.assert_close(out[0, 1], few[0, 1], atol=16 * eps, rtol=0)
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_merged_parts(lane: Lane, dtype: torch.dtype) -> None:
    """A part that is NaN, beside one that is not and beside one that saw nothing."""
    outs = [on(torch.ones(1, 3, 1, 8, dtype=dtype), lane.device) for _ in range(2)]
    outs[0][0, :2] = math.nan
    lses = [torch.tensor([[[math.nan, math.nan, 1.0]]]), torch.tensor([[[0.0, -math.inf, -math.inf]]])]
    merged = on_own_stack(
        lane, lambda: da.merge_attention(outs, [on(x, lane.device) for x in lses], backend=lane.backend)
    )
    out, lse = (x.cpu() for x in merged)
    assert out[0, :2].isnan().all() and lse[0, 0, :2].isnan().all()
    assert (out[0, 2] == 1).all() and lse[0, 0, 2] == 1


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("wrong", ["one key", "every key"])
@pytest.mark.parametrize("invariant", [False, True])
def test_keys_in_pages(lane: Lane, dtype: torch.dtype, wrong: str, invariant: bool, length: int = 5000) -> None:
    """Long enough for parts, of which one holds the NaN."""
    length = 100 if lane.slow else length
    pages = torch.randn(-(-length // 16), 16, 1, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    k_pages = pages.clone()
    k_pages[:, :, :, 3] = math.nan if wrong == "every key" else 0.5
    k_pages[2, 5] = math.nan
    q = torch.randn(1, 2, DIM).to(dtype)
    table = torch.arange(len(pages), dtype=torch.int32)[None]
    lengths = torch.tensor([length], dtype=torch.int32)
    given = [on(x, lane.device) for x in (q, k_pages, pages, table, lengths)]
    out, lse = on_own_stack(
        lane, lambda: da.paged_attention(*given, return_lse=True, batch_invariant=invariant, backend=lane.backend)
    )
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_a_query_over_quantised_pages(lane: Lane, stored: torch.dtype, bad: float) -> None:
    pages = torch.randint(1, 50, (3, 16, 1, DIM), generator=torch.Generator().manual_seed(2)).to(stored)
    pages[:, :, :, 3] = pages[:, :, :, 3].float().mul(torch.tensor([-1.0, 1.0]).repeat(8)[None, :, None]).to(stored)
    q = torch.ones(2, 2, DIM, dtype=BFLOAT16)
    q[1, 0, 3] = bad
    table, lengths = torch.arange(3, dtype=torch.int32).repeat(2, 1), torch.tensor([40, 40], dtype=torch.int32)
    given = [on(x, lane.device) for x in (q, pages, pages, table, lengths)]
    out, lse = on_own_stack(lane, lambda: da.paged_attention(*given, return_lse=True, backend=lane.backend))
    wrong = torch.tensor([[False, False], [True, False]])
    out, lse = out.cpu(), lse.cpu().T
    assert out[wrong].isnan().all() and not lse[wrong].isfinite().any()
    assert out[~wrong].isfinite().all() and lse[~wrong].isfinite().all()
