"""A thousand times the same bits, while something else keeps the device busy: what a race would not give."""

from __future__ import annotations

import time

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from ..lanes import Lane
from .devices import load, sized

SECONDS = 15  # within which the thousand end; where other processes have the card too, fewer, and the test says so


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_the_same_bits_in_every_repeat(card: Lane, what: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, length = sized(card, 4, 1), sized(card, 700, 20)
    q, k, v, dout = (
        torch.randn(batch, length, heads, 64, device=card.device).to(dtype).requires_grad_() for heads in (4, 2, 2, 4)
    )
    table = torch.randn(4, 33, device=card.device).requires_grad_()
    mask = da.Mask(torch.full((batch,), 9, dtype=torch.int32, device=card.device), 300, 0)

    def step() -> tuple[Tensor, ...]:
        out, lse = da.attention(
            q, k, v, mask, distance_bias=table, return_lse=True, deterministic=True, backend=card.backend
        )
        if what == "forward":
            return out.detach(), lse.detach()
        return torch.autograd.grad(out, (q, k, v, table), dout.detach())

    first = [x.clone() for x in step()]
    different = torch.zeros((), dtype=torch.int64, device=card.device)  # counted there: no repeat waits for the host
    end = time.monotonic() + SECONDS
    wanted, done = sized(card, 1000, 1 if card.slow else 20), 0
    with load(card):
        while done < wanted and (done == 0 or time.monotonic() < end):
            done += 1
            for before, now in zip(first, step(), strict=True):
                different += (before != now).sum()
    assert all(x.isfinite().all() for x in first)
    assert int(different) == 0
    if done < wanted:
        pytest.skip(f"{done} of {wanted} repeats in {SECONDS} s, all with the same bits")
