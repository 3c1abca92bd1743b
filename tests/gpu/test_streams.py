"""Kernels go to the current stream: what was put before them on it is done, what follows waits for them."""

from __future__ import annotations

from contextlib import nullcontext

import duplex_attn as da
import torch

from ..lanes import Lane
from .devices import has_card, widest

CYCLES = 500_000_000  # some 250 ms: longer than anything could take to be launched


def test_a_call_on_another_stream_waits_for_its_inputs(card: Lane) -> None:
    torch.manual_seed(0)
    good, bad = (torch.randn(2, 40, 2, 32, device=card.device).to(widest(card)) for _ in range(2))
    expected = da.attention(good, good, good, da.causal(), backend=card.backend)
    gradient = torch.autograd.grad(
        da.attention(x := good.clone().requires_grad_(), x, x, backend=card.backend), x, good
    )[0]
    x = bad.clone().requires_grad_()
    stream = torch.cuda.Stream() if has_card(card) else None
    if stream is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        if stream is not None:
            torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            x.copy_(good)
        out = da.attention(x.detach(), x.detach(), x.detach(), da.causal(), backend=card.backend)
        found = torch.autograd.grad(da.attention(x, x, x, backend=card.backend), x, good)[0]
        copied = out.clone()
    if stream is not None:
        assert not stream.query(), "the device was done before the host: nothing was shown"
        torch.cuda.synchronize()
    assert torch.equal(copied, expected) and torch.equal(out, expected)
    torch.testing.assert_close(found, gradient)
