"""Each wait and fence of the kernels is needed: where the machine ignores one, some order of events shows it."""

from __future__ import annotations

import pytest
import torch

from ..cases import Case, make
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import draw, left_out

# Two stages in flight, several tiles a block, rows of strangers behind the keys.
CASE = Case("packed_with_tail", ((150, 70), (150, 300)), (2, 1), (128, 128), torch.bfloat16, mask="causal")
STAGES = 2
MBARRIERS = ["q_full", "q_empty"]
MBARRIERS += [f"{of}_{stage}" for stage in range(STAGES) for of in ("k_full", "k_empty", "v_full", "v_empty")]
ALL_COMPUTE = 3  # the named barrier of both computing warpgroups
SEEDS = 24  # every way that the machine divides what is late


def outcome(lane: Lane, seed: int) -> str:
    made = make(CASE)
    exact, plain, floor = made.answers(gradients=False)
    draw(seed, processors=1)
    try:
        assert_accurate(run(made.call, lane), exact, plain, floor)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


def test_nothing_is_left_out(emulated: Lane) -> None:
    assert {outcome(emulated, seed) for seed in range(SEEDS)} == {""}


@pytest.mark.parametrize(
    ("what", "number"),
    [
        *(pytest.param("mbarrier_wait", n, id=name) for n, name in enumerate(MBARRIERS)),
        pytest.param("named_sync", ALL_COMPUTE, id="strangers_cleared"),
        *(pytest.param(what, 0, id=what) for what in ("proxy_fence", "product_wait", "product_fence", "block_sync")),
    ],
)
def test_what_is_left_out_is_noticed(emulated: Lane, what: str, number: int) -> None:
    with left_out(what, number):
        assert any(outcome(emulated, seed) for seed in range(SEEDS))
