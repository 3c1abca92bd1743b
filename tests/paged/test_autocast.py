"""The paged calls under autocast: queries and new keys become what pages hold, or autocast's where pages hold bytes."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
from torch import Tensor

TABLE = torch.arange(4, dtype=torch.int32).view(2, 2)
POSITIONS = torch.tensor([4, 7], dtype=torch.int32)
LENGTHS = POSITIONS + 1


def pages(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of 4 slots and 2 heads of 8, and the scales that bytes want."""
    k, v = (torch.zeros(4, 4, 2, 8, dtype=dtype) for _ in range(2))
    scales = {f"{name}_scales": torch.ones(4, 4, 2) for name in "kv"} if dtype.itemsize == 1 else {}
    return k, v, scales


def step(x: Tensor, k_pages: Tensor, v_pages: Tensor, scales: dict[str, Tensor]) -> Tensor:
    da.paged_append(x, -x, k_pages, v_pages, TABLE, POSITIONS, **scales)
    return da.paged_attention(x, k_pages, v_pages, TABLE, LENGTHS, **scales)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_step(stored: torch.dtype) -> None:
    x = torch.randn(2, 2, 8)
    given, by_hand = pages(stored), pages(stored)
    computed = torch.bfloat16 if stored.itemsize == 1 else stored
    with torch.autocast("cpu", torch.bfloat16):
        out = step(x, *given)
    want = step(x.to(computed), *by_hand)
    assert out.dtype == computed and torch.equal(out, want)
    assert torch.equal(given[0].float(), by_hand[0].float()) and given[0].float().abs().sum() > 0


def test_off_leaves_everything() -> None:
    x, (k_pages, v_pages, scales) = torch.randn(2, 2, 8), pages(torch.bfloat16)
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match=r"^k_pages"):
        step(x, k_pages, v_pages, scales)
