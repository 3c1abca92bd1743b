"""What forward and backward hold at their peak, and that nothing of a call stays."""

from __future__ import annotations

import gc
from collections.abc import Callable

import duplex_attn as da
import pytest
import torch
from duplex_attn.profile.memory import peak_memory
from torch import Tensor

from ..lanes import Lane
from .devices import GIB, has_card, needs_room, sized, widest

ALLOWED = {torch.float32: 1.05, torch.bfloat16: 1.45}  # of q, k, v, out, lse and their gradients
SLACK = 2 * 2**20  # bytes: what an allocator rounds up, and scratch of threads


def step_of(lane: Lane, length: int, dtype: torch.dtype, heads: int = 8) -> tuple[Callable[[], None], int, int]:
    """Forward and backward, the bytes that they are given, and those that the promise is about."""
    made = [torch.randn(1, length, heads, 64, device=lane.device).to(dtype) for _ in range(4)]
    leaves, dout = [x.requires_grad_() for x in made[:3]], made[3]

    def step() -> None:
        out = da.attention(*leaves, da.causal(), backend=lane.backend)
        torch.autograd.grad(out, leaves, dout)

    given = sum(x.nbytes for x in made)
    return step, given, 2 * given + 4 * heads * length


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_the_peak_of_32k_tokens(card: Lane, dtype: torch.dtype) -> None:
    if card.slow:
        pytest.skip("the interpreter copies what it works on")
    needs_room(card, 4 * GIB)
    step_of(card, 64, dtype)[0]()
    step, given, promised = step_of(card, sized(card, 32 * 1024, 4096), dtype)
    peak = peak_memory(step, torch.device(card.device))
    if peak is None:
        pytest.skip("this system does not tell its peak memory")
    assert given + peak <= ALLOWED[dtype] * promised + SLACK


def test_a_thousand_calls_leave_nothing_behind(card: Lane) -> None:
    step, _, _ = step_of(card, sized(card, 1024, 16), widest(card), heads=2)
    step()
    held = tensors(card)
    for _ in range(sized(card, 1000, 5)):
        step()
    assert tensors(card) == held


def tensors(lane: Lane) -> tuple[int, int]:
    """How many there are, and on a card how many bytes its allocator has given out."""
    gc.collect()
    count = sum(type(x) is Tensor for x in gc.get_objects())
    if not has_card(lane):
        return count, 0
    torch.cuda.synchronize()
    return count, torch.cuda.memory_allocated()
