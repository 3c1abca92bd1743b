"""Offsets past 2^31 elements in tensors that really have so many, and more heads than a grid has on its y axis."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from ..lanes import Lane, run
from ..oracle import Answer, Call, answer, assert_accurate, floors
from .devices import GIB, needs_room, sized

PAST = 2**31
pytestmark = pytest.mark.timeout(75, func_only=True)  # without the wait for the card's memory


def normal(lane: Lane, *shape: int) -> Tensor:
    """bfloat16, made where it is needed: gigabytes of it are slow to send."""
    generator = torch.Generator(lane.device).manual_seed(sum(shape))
    return torch.randn(shape, device=lane.device, dtype=torch.bfloat16, generator=generator)


def agrees(got: Answer, call: Call, dout: Tensor | None = None) -> None:
    exact, plain = (answer(call, dtype, dout) for dtype in (torch.float64, torch.bfloat16))
    assert_accurate(got, exact, plain, {name: 2 * x for name, x in floors(call, exact, dout).items()})


@pytest.mark.usefixtures("gigabytes")
def test_queries_and_outputs(card: Lane) -> None:
    """(batch, 8, 64, 128) with one kv head: the last sequences lie past 2^31 in q, out and their gradients."""
    batch, rows, heads, dim = sized(card, 33_000, 3), 8, sized(card, 64, 2), 128
    needs_room(card, 26 * GIB)
    q, dout = normal(card, batch, rows, heads, dim), normal(card, batch, rows, heads, dim)
    k, v = normal(card, batch, rows, 1, dim), normal(card, batch, rows, 1, dim) + 1
    assert q.numel() > PAST or card.device == "cpu"
    got = run(Call(q, k, v, right=0), card, dout)
    for b in (0, batch - 1):
        one = slice(b, b + 1)
        call = Call(*(x[one].cpu() for x in (q, k, v)), right=0)
        agrees({name: x[one].cpu() for name, x in got.items()}, call, dout[one].cpu())


@pytest.mark.usefixtures("gigabytes")
def test_keys_and_values(card: Lane) -> None:
    """So many keys that the last, which alone are seen, lie past 2^31 in k and v."""
    keys, heads, dim, window = sized(card, 2_100_000, 500), 8, 128, 90
    needs_room(card, 14 * GIB)
    q, k, v = normal(card, 1, 20, heads, dim), normal(card, 1, keys, heads, dim), normal(card, 1, keys, heads, dim)
    assert k.numel() > PAST or card.device == "cpu"
    got = run(Call(q, k, v, left=window, right=0), card)
    near = Call(q.cpu(), k[:, -128:].cpu(), v[:, -128:].cpu(), left=window, right=0)
    agrees({name: x.cpu() for name, x in got.items()}, near)


def test_more_heads_than_65535(card: Lane) -> None:
    """batch * heads on one axis of the grid, in every kernel of forward and backward, and in merge."""
    batch, heads, dim = sized(card, 9_000, 5), 8, 16
    q, k, v, dout = (normal(card, batch, 2, heads, dim) for _ in range(4))
    assert batch * heads > 65_535 or card.device == "cpu"
    got = run(Call(q, k, v), card, dout)
    last = slice(batch - 1, batch)
    agrees({n: x[last].cpu() for n, x in got.items()}, Call(*(x[last].cpu() for x in (q, k, v))), dout[last].cpu())
    merged, lse = da.merge_attention([got["out"]] * 2, [got["lse"]] * 2, backend=card.backend)
    torch.testing.assert_close(merged, got["out"])
    torch.testing.assert_close(lse, got["lse"] + torch.log(torch.tensor(2.0)).item())
