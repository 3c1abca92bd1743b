"""A sample of the generated grid: outputs and every gradient against the float64 oracle."""

import pytest

from ..cases import Case, grid
from ..checking import check
from ..lanes import Lane
from .conftest import CARD, SMALL

PAIRS = [
    *((lane, case) for lane in SMALL for case in grid()[7:8]),  # all of them run in tests/kernels
    *(pytest.param(lane, case, marks=pytest.mark.gpu) for lane in CARD for case in grid()[::8]),
]


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize(("card", "case"), PAIRS, ids=str, indirect=["card"])
def test_forward_and_backward(card: Lane, case: Case) -> None:
    check(case, card, gradients=True)
