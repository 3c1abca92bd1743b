"""Every backend against the oracle over the generated grid: outputs, every gradient, and nothing written that is not its own."""

import dataclasses

import pytest

from ..cases import CHOICES, Case, covering, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def check(case: Case, lane: Lane, gradients: bool) -> None:
    made = problem(case)
    exact, plain, floor = made.answers(gradients)
    wanted = (made.dout, made.dlse) if gradients else (None, None)
    got = run(made.call, lane, *wanted, deterministic=case.deterministic)
    for name, x in got.items():
        like = {"out": made.call.q, "lse": exact["lse"].float()}.get(name, getattr(made.call, name[1:], None))
        assert x.dtype == like.dtype, f"{name}: dtype {x.dtype}, expected {like.dtype}"
    assert_accurate(got, exact, plain, floor, f"{lane}: {case}")
    assert set(got) == set(exact)
    made.guard.assert_untouched()


@pytest.mark.parametrize("case", grid(), ids=str)
def test_forward(case: Case, lane: Lane) -> None:
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
    if lane.backend != "reference":
        with pytest.raises(ValueError, match=r"row_distance_bias|row/col"):
            run(problem(case).call, lane)
        return
    check(case, lane, gradients=True)


def test_the_grid_holds_every_pair_of_choices() -> None:
    rows = [dataclasses.asdict(case) for case in grid()]
    for a in CHOICES:
        for b in CHOICES:
            if a < b:
                assert {(row[a], row[b]) for row in rows} == {(x, y) for x in CHOICES[a] for y in CHOICES[b]}
    assert covering(CHOICES) == covering(CHOICES)
