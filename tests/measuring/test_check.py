"""What is checked of gradients before they are timed: the same whether many rows are looked at together or few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import check

ROWS, KEYS, DIM = 48, 64, 16


class Largest(TorchDispatchMode):
    """How many numbers the largest of all tensors that are made within holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def made(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, rows, DIM, dtype=dtype) for rows in (ROWS, KEYS, KEYS, ROWS)]


def causal(rows: Tensor) -> Tensor:
    return check.seen(rows, ROWS, KEYS, 0, None, 0)


def by_autograd(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([] if bias is None else [bias]))]
    scores = leaves[0] @ leaves[1].mT * DIM**-0.5 + (0 if bias is None else leaves[3])
    scores = scores.masked_fill(~causal(torch.arange(ROWS)), float("-inf"))
    return torch.autograd.grad(scores.softmax(-1) @ leaves[2], leaves, dout)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, ROWS])
def test_rows_some_at_a_time(rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "AT_ONCE", rows * 2 * KEYS * 8)
    given, plane = made(torch.float64), torch.randn(ROWS, KEYS, dtype=torch.float64)
    bias = check.Bias(plane, lambda values: values, 2) if with_bias else None
    found, _ = check.of_formula(*given, causal, bias, torch.float64)
    expected = by_autograd(*given, plane if with_bias else None)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert check.gradients(found, *given, causal, bias).passes(ours=True)
    for n, wrong in enumerate(found):
        spoilt = [x.clone() for x in found]
        spoilt[n].view(-1)[-1] += 1e-3 * (1 + wrong.abs().max())
        assert not check.gradients(spoilt, *given, causal, bias).passes(ours=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_plain_formula_errs_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allowed follows from its error, which no rounding between the parts may add to."""
    given = made(dtype)
    allowed = []
    for rows in (ROWS, 4):
        monkeypatch.setattr(check, "AT_ONCE", rows * 2 * KEYS * 8)
        truth, _ = check.of_formula(*given, causal, None, torch.float64)
        allowed.append(check.gradients([x.to(dtype) for x in truth], *given, causal).allowed)
    assert allowed[1] == pytest.approx(allowed[0], rel=1e-3)


def test_scores_of_long_sequences_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = made(torch.bfloat16)
    monkeypatch.setattr(check, "AT_ONCE", 4 * 2 * KEYS * 8)
    with Largest() as largest:
        check.gradients(given[:3], *given, causal)
    assert largest.numbers == max(x.numel() for x in given) < 2 * ROWS * KEYS
