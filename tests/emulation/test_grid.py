"""The CUDA kernels, emulated, against the oracle over the generated grid: what they do not take is refused, what is left is right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ..cases import Case, grid, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import draw

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

FITTING_LAYOUTS = {
    "dense_odd": "dense",
    "dense_sliced": "dense_sliced_by_8",
    "padded_anywhere": "padded_anywhere_by_8",
    "packed_heads_first": "packed_heads_first_by_8",
}


def fitting(case: Case) -> Case:
    """The nearest case that the kernels take."""
    return dataclasses.replace(
        case,
        dtype=torch.bfloat16 if case.dtype == torch.float32 else case.dtype,
        layout=FITTING_LAYOUTS.get(case.layout, case.layout),
        head_dims=tuple(-(-d // 8) * 8 for d in case.head_dims),
        bias="none",
        dropout_p=0.0,
    )


@pytest.mark.parametrize("case", grid(), ids=str)
def test_forward(case: Case, kernels: Lane) -> None:
    made = problem(fitting(case))
    exact, plain, floor = made.answers(gradients=False)
    if kernels.device == "cpu":
        draw(case.seed, processors=1 + case.seed % 3)
    got = run(made.call, kernels)
    assert_accurate(got, exact, plain, floor, str(case))
    made.guard.assert_untouched()


@pytest.mark.parametrize("case", [case for case in grid() if fitting(case) != case], ids=str)
def test_what_they_do_not_take_is_refused_with_its_reason(case: Case, kernels: Lane) -> None:
    with pytest.raises(ValueError, match=r"cuda: (its kernels have no|it takes bfloat16|[qkv]: bulk copies want)"):
        run(problem(case).call, kernels)
