"""A captured call serves other lengths, prefixes and seeds: all of them are read on the device."""

from __future__ import annotations

import itertools

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import BACKENDS
from torch import Tensor

from ..lanes import Lane
from ..oracle import GRADIENTS, Call, answer, assert_accurate, floors
from .devices import replayable

TOTAL, LONGEST, HEADS, DIM = 72, 40, 2, 32
STEPS = [([20, 5, 31], [0, 0, 0]), ([1, 40, 7], [1, 25, 99]), ([0, 30, 30], [5, 0, 30]), ([20, 5, 31], [20, 2, 0])]


def int32(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rows(lane: Lane, n: int, heads: int = HEADS) -> Tensor:
    return torch.randn(n, heads, DIM).to(lane.device, torch.bfloat16)


@pytest.mark.parametrize("deterministic", [True, False])
def test_lengths_and_prefixes_change_between_replays(card: Lane, deterministic: bool) -> None:
    """A packed step with its backward; rows past the last sequence are those of a padded batch."""
    torch.manual_seed(0)
    q, k, v, dout = (rows(card, TOTAL) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu, prefix = int32(0, 24, 48, TOTAL, device=card.device), int32(0, 0, 0, device=card.device)

    def step() -> tuple[Tensor, ...]:
        mask = da.prefix_lm(prefix)
        out, lse = da.varlen_attention(
            *leaves, cu, cu, LONGEST, LONGEST, mask, return_lse=True, deterministic=deterministic, backend=card.backend
        )
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)

    replay = replayable(step, card)
    for lengths, prefixes in STEPS:
        cu.copy_(int32(0, *itertools.accumulate(lengths)))
        prefix.copy_(int32(*prefixes))
        found = dict(zip(("out", "lse", "dq", "dk", "dv"), (x.clone() for x in replay()), strict=True))
        call = Call(*(x.detach().cpu() for x in leaves), cu.cpu(), cu.cpu(), prefix=prefix.cpu(), right=0)
        outside = slice(sum(lengths), None)
        assert not found["out"][outside].any() and bool((found["lse"][:, outside] == -torch.inf).all())
        gradient = dout.cpu()
        gradient[outside] = 0
        exact, plain = (answer(call, dtype, gradient) for dtype in (torch.float64, torch.bfloat16))
        assert {f"d{n}" for n in GRADIENTS[:3]} <= exact.keys()
        assert_accurate(found, exact, plain, floors(call, exact, gradient), f"{lengths} {prefixes}")


def test_a_seed_that_changes_between_replays(card: Lane) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 30, HEADS, DIM, device=card.device)
    seed = torch.tensor([3], device=card.device)

    def call() -> Tensor:
        return da.attention(x, x, x, dropout_p=0.4, seed=seed, backend=card.backend)

    replay = replayable(call, card)
    seen = []
    for number in (3, 4, 3):
        seed.fill_(number)
        seen.append(replay().clone())
        assert torch.equal(seen[-1], da.attention(x, x, x, dropout_p=0.4, seed=number, backend=card.backend))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_decoding_steps_replay_over_growing_sequences(card: Lane) -> None:
    """Lengths, tables and pages change in place; a sequence of length 0 is a slot that nobody has."""
    if reason := BACKENDS[card.backend].refuses_paged(torch.empty(0, device=card.device), None):
        pytest.skip(f"{card}: {reason}")
    torch.manual_seed(0)
    batch, pages, page, heads_q = 3, 12, 16, 4
    k_pages, v_pages = (torch.randn(pages, page, HEADS, DIM).to(card.device, torch.bfloat16) for _ in range(2))
    q, table = rows(card, batch, heads_q), torch.zeros(batch, 4, dtype=torch.int32, device=card.device)
    lengths = int32(1, 1, 1, device=card.device)

    def call() -> Tensor:
        with torch.no_grad():
            return da.paged_attention(q, k_pages, v_pages, table, lengths, backend=card.backend)

    replay = replayable(call, card)
    for step in ([1, 17, 64], [2, 18, 1], [33, 0, 2]):
        lengths.copy_(int32(*step))
        table.copy_(torch.randperm(pages)[: batch * 4].view(batch, 4))
        q.copy_(rows(card, batch, heads_q))
        found = replay().clone()
        gathered = [
            torch.cat([x[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(step)]).cpu()
            for x in (k_pages, v_pages)
        ]
        cu_k = int32(0, *itertools.accumulate(step))
        packed = Call(q.cpu(), *gathered, int32(0, 1, 2, 3), cu_k, right=0)
        exact, plain = (answer(packed, dtype) for dtype in (torch.float64, torch.bfloat16))
        floor = {name: 2 * x for name, x in floors(packed, exact).items()}  # few rows: the plain error may be small
        assert_accurate({"out": found}, exact, plain, floor, str(step))
