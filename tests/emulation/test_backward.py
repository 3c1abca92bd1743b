"""Gradients of the CUDA kernels, emulated, against the oracle."""

from __future__ import annotations

import pytest

from ..cases import Case, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import CARDS, draw
from .test_grid import fitting

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def sampled() -> list[object]:
    """A part of the grid for each generation: the machine takes its time for these."""
    return [
        pytest.param(kernels, case, marks=[pytest.mark.gpu] * (kernels == "card"), id=f"{kernels}-{case}")
        for kernels in (*CARDS, "card")
        for case in (grid()[1::3] if kernels == "sm80" else grid()[::2])
    ]


@pytest.mark.parametrize(("kernels", "case"), sampled(), indirect=["kernels"])
def test_gradients(case: Case, kernels: Lane) -> None:
    made = problem(fitting(case))
    exact, plain, floor = made.answers(gradients=True)
    if kernels.device == "cpu":
        draw(case.seed, processors=1 + case.seed % 3)
    got = run(made.call, kernels, made.dout, made.dlse, case.deterministic)
    assert {"dq", "dk", "dv"} <= got.keys()
    assert_accurate(got, exact, plain, floor, str(case))
    made.guard.assert_untouched()
