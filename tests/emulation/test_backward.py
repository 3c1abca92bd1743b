"""Gradients of the CUDA kernels, emulated, against the oracle."""

from __future__ import annotations

import pytest

from ..cases import Case, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import CARDS, draw, launched
from .test_grid import fitting

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def sampled() -> list[object]:
    """A part of the grid for each generation: the machine takes its time for these. All that Hopper's kernel for all
    gradients takes runs by it and by those for each."""
    found = []
    for kernels in (*CARDS, "card"):
        for case in grid()[1::3] if kernels == "sm80" else grid()[::2]:
            both = kernels == "sm90" and max(case.head_dims) <= 128
            for deterministic in (False, True) if both else (case.deterministic,):
                name = f"{kernels}-{case}{',fused' if both and not deterministic else ''}"
                marks = [pytest.mark.gpu] * (kernels == "card")
                found.append(pytest.param(kernels, case, deterministic, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("kernels", "case", "deterministic"), sampled(), indirect=["kernels"])
def test_gradients(case: Case, deterministic: bool, kernels: Lane, request: pytest.FixtureRequest) -> None:
    """The kernel for all at once has no gradient of distance_bias, which is a constant there."""
    fused = request.node.callspec.id.endswith(",fused")
    made = problem(fitting(case))
    exact, plain, floor = made.answers(gradients=True)
    if kernels.device == "cpu":
        draw(case.seed, processors=1 + case.seed % 3)
        launched()
    constants = ("distance_bias",) if fused else ()
    got = run(made.call, kernels, made.dout, made.dlse, deterministic, constants=constants)
    assert {"dq", "dk", "dv"} <= got.keys()
    if kernels.device == "cpu":
        assert ("fused" in launched()) == fused
    assert_accurate(got, exact, plain, floor, str(case))
    made.guard.assert_untouched()
