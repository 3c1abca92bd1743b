"""Gradients of the CUDA kernels, emulated, against the oracle."""

from __future__ import annotations

import pytest

from ..cases import Case, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import draw
from .test_grid import fitting

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.mark.parametrize("case", grid()[::2], ids=str)
def test_gradients(case: Case, hopper: Lane) -> None:
    """Of all but distance_bias, which is a constant here."""
    made = problem(fitting(case))
    exact, plain, floor = made.answers(gradients=True)
    if hopper.device == "cpu":
        draw(case.seed, processors=1 + case.seed % 3)
    got = run(made.call, hopper, made.dout, made.dlse, case.deterministic, constants=("distance_bias",))
    assert {"dq", "dk", "dv"} <= got.keys()
    assert_accurate(got, exact, plain, floor, str(case))
    made.guard.assert_untouched()
