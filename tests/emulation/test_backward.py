"""Gradients of the CUDA kernels, emulated, against the oracle."""

from __future__ import annotations

import dataclasses

import pytest

from ..cases import Case, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import CARDS, draw
from .test_grid import fitting

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def differentiable(case: Case) -> Case:
    """The nearest case whose gradients the kernels have; a table of distances has none, so slopes take its place."""
    case = fitting(case)
    if case.distance_radius is None:
        return case
    return dataclasses.replace(case, distance_radius=None, alibi=True)


def sampled() -> list[object]:
    """Those of sm80, which the machine takes longest for, are every third of the grid."""
    return [
        pytest.param(kernels, case, marks=[pytest.mark.gpu] * (kernels == "card"), id=f"{kernels}-{case}")
        for kernels in (*CARDS, "card")
        for case in grid()[:: 3 if kernels == "sm80" else 1]
    ]


@pytest.mark.parametrize(("kernels", "case"), sampled(), indirect=["kernels"])
def test_gradients(case: Case, kernels: Lane) -> None:
    made = problem(differentiable(case))
    exact, plain, floor = made.answers(gradients=True)
    if kernels.device == "cpu":
        draw(case.seed, processors=1 + case.seed % 3)
    got = run(made.call, kernels, made.dout, made.dlse, deterministic=case.deterministic)
    assert_accurate(got, exact, plain, floor, str(case))
    made.guard.assert_untouched()
