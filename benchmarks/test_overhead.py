"""What a call costs where there is nothing to compute, from Python."""

from __future__ import annotations

from functools import partial

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from duplex_attn.profile.timing import Spread

from .bar import OURS, Bar, Bench, at_most, side_by_side
from .exact import verify

LIMITS = {"without gradients": 25.0, "with gradients": 45.0}  # microseconds
MICRO = 1e6


@pytest.mark.parametrize("call", ["attention", "varlen_attention"])
@pytest.mark.parametrize("gradients", LIMITS)
def test_call(bench: Bench, call: str, gradients: str) -> None:
    """(1, 1, 1, 64) float32; with gradients, the forward call records what backward needs."""
    recording = gradients == "with gradients"
    q, k, v = (bench.tensor(1, 1, 1, 64, dtype=torch.float32, seed=i, requires_grad=recording) for i in range(3))
    if call == "attention":
        ours = partial(da.attention, q, k, v)
        verify(ours().detach(), q.detach(), k.detach(), v.detach(), da.full())
    else:
        cu_seqlens = torch.tensor([0, 1], dtype=torch.int32, device=bench.device)
        ours = partial(da.varlen_attention, q[0].detach(), k[0].detach(), v[0].detach(), cu_seqlens, cu_seqlens, 1, 1)
        if recording:
            leaves = [x.detach()[0].requires_grad_() for x in (q, k, v)]
            ours = partial(da.varlen_attention, *leaves, cu_seqlens, cu_seqlens, 1, 1)
        verify(ours().detach()[None], q.detach(), k.detach(), v.detach(), da.full())
    sdpa = partial(F.scaled_dot_product_attention, *(x.transpose(1, 2) for x in (q, k, v)))
    seconds = side_by_side(bench, ours, {"sdpa": sdpa})
    measured = Spread.of([value * MICRO for value in seconds[OURS]])
    spreads = {side: Spread.of(found) for side, found in seconds.items()}
    bench.keep(Bar("overhead", f"{call} {gradients}", at_most(LIMITS[gradients], "us"), measured, spreads))
