"""Every backend against the oracle over the generated grid: outputs, every gradient, and nothing written that is not its own."""

import dataclasses

import pytest

from ..cases import CHOICES, Case, covering, grid
from ..checking import check
from ..lanes import Lane

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.mark.parametrize("case", grid(), ids=str)
def test_forward(case: Case, lane: Lane) -> None:
    if lane.slow and case.seed % 8:
        pytest.skip("the interpreter runs every eighth: with gradients, below, it runs the same forward of all")
    check(case, lane, gradients=False)


@pytest.mark.parametrize("case", grid(), ids=str)
def test_forward_and_backward(case: Case, lane: Lane) -> None:
    check(case, lane, gradients=True)


ROW_COL = [
    dataclasses.replace(case, row_col_radius=radius)
    for case, radius in zip(grid()[::9], (0, 1, 4, 30) * len(grid()), strict=False)
]


@pytest.mark.parametrize("case", ROW_COL, ids=str)
def test_row_and_column_distance_bias(case: Case, lane: Lane) -> None:
    check(case, lane, gradients=True)


def test_the_grid_holds_every_pair_of_choices() -> None:
    rows = [dataclasses.asdict(case) for case in grid()]
    for a in CHOICES:
        for b in CHOICES:
            if a < b:
                assert {(row[a], row[b]) for row in rows} == {(x, y) for x in CHOICES[a] for y in CHOICES[b]}
    assert covering(CHOICES) == covering(CHOICES)
