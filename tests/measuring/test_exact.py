"""What is checked of a dense answer before it is timed."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch

from benchmarks.exact import verify


@pytest.mark.parametrize("mask", [da.full(), da.causal(), da.prefix_lm(5), da.sliding_window(3, 1)], ids=str)
def test_the_right_output_passes_and_no_other(mask: da.Mask) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 12, 4, 16), torch.randn(2, 15, 2, 16), torch.randn(2, 15, 2, 16)
    out = da.attention(q, k, v, mask, backend="reference")
    assert verify(out, q, k, v, mask).difference < 1e-5
    wrong = out.clone()
    wrong[0, 3, 0, 7] += 1e-4
    with pytest.raises(AssertionError, match="from float64"):
        verify(wrong, q, k, v, mask)


def test_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = (torch.randn(1, n, 1, 8) for n in (6, 3, 3))
    out = da.attention(q, k, v, da.causal(), backend="reference")
    verify(out, q, k, v, da.causal())
    assert out[0, :3].abs().max() == 0
