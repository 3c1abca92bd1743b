"""Each wait, barrier and fence of the kernels is needed: where the machine ignores one, some order of events shows it."""

from __future__ import annotations

import pytest
import torch

from ..cases import Case, make
from ..lanes import Lane, run
from ..oracle import assert_accurate
from .library import CARDS, EMULATED, EMULATED_ONLY, TICKETS, draw, left_out

# Four stages in flight and two tiles of queries, several tiles a block, of which one begins with each stage, rows of strangers behind the keys.
CASE = Case("packed_with_tail", ((150, 70, 40), (150, 300, 290)), (2, 1), (64, 64), torch.bfloat16, mask="causal")
# No sequence has more than two blocks of keys.
SHORT = Case("packed_with_tail", ((150, 70, 200), (150, 100, 250)), (2, 1), (64, 64), torch.bfloat16, mask="causal")
STAGES = 4
MBARRIERS = [f"q_{of}_{stage}" for stage in range(2) for of in ("full", "empty")]
MBARRIERS += [f"{of}_{stage}" for stage in range(STAGES) for of in ("k_full", "k_empty", "v_full", "v_empty")]
# What tells that there is room for what comes after the next tile, which is taken so early where tiles are short alone.
AHEAD = [name for name in (*MBARRIERS, *TICKETS) if name.startswith(("q_empty", "ticket_empty"))]
ALL_COMPUTE = 3  # the named barrier of both computing warpgroups
SEEDS = 24  # every way that the machine divides what is late
NEEDED = {
    "sm80": [("copy_wait", 0, "copy_wait"), ("block_sync", 0, "block_sync")],
    "sm90": [
        *(("mbarrier_wait", n, name) for n, name in enumerate((*MBARRIERS, *TICKETS)) if name not in AHEAD),
        ("named_sync", ALL_COMPUTE, "strangers_cleared"),
        *((what, 0, what) for what in ("proxy_fence", "product_wait", "product_fence", "block_sync")),
    ],
}


def outcome(lane: Lane, seed: int, case: Case = CASE) -> str:
    made = make(case)
    exact, plain, floor = made.answers(gradients=False)
    draw(seed, processors=1)
    try:
        assert_accurate(run(made.call, lane), exact, plain, floor)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


@EMULATED_ONLY
def test_nothing_is_left_out(kernels: Lane) -> None:
    assert {outcome(kernels, seed) for seed in range(SEEDS)} == {""}


@pytest.mark.parametrize(
    ("card", "what", "number"),
    [
        pytest.param(card, what, number, id=f"{card}-{name}")
        for card, left in NEEDED.items()
        for what, number, name in left
    ],
)
def test_what_is_left_out_is_noticed(emulated: Lane, card: str, what: str, number: int) -> None:
    with EMULATED.on(CARDS[card]), left_out(what, number):
        assert any(outcome(emulated, seed) for seed in range(SEEDS))


def test_nothing_is_left_out_of_short_tiles(emulated: Lane) -> None:
    assert {outcome(emulated, seed, SHORT) for seed in range(SEEDS)} == {""}


@pytest.mark.parametrize("name", AHEAD)
def test_what_short_tiles_leave_out_is_noticed(emulated: Lane, name: str) -> None:
    with left_out("mbarrier_wait", [*MBARRIERS, *TICKETS].index(name)):
        assert any(outcome(emulated, seed, SHORT) for seed in range(SEEDS))
