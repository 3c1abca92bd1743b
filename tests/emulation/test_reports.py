"""What the emulated machine reports of kernels that are wrong on purpose."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from .library import compiler, draw, functions
from .primitives import run
from .test_machine import BF16, normal, to_registers

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

WRONG = {  # what a kernel does wrong, as probes.cpp numbers it -> what the machine says, or None where the numbers are NaN
    "writes_are_not_fenced": (1, "a product reads ordinary writes to shared memory that were not fenced"),
    "copy_is_not_waited_for": (2, "a bulk copy overwrites ordinary writes|with bulk copies that nobody waited for|NaN"),
    "product_is_not_waited_for": (3, "NaN"),
    "accumulators_are_touched": (4, "accumulators were touched while a product adds to them"),
    "registers_are_not_fenced": (5, "without wgmma.fence"),
    "more_bytes_are_expected": (6, "deadlock: 128 threads at an mbarrier"),
    "more_threads_arrive": (7, "more threads arrive at an mbarrier than it was made for"),
    "copy_over_unfenced_writes": (8, "a bulk copy overwrites ordinary writes"),
    "a_lane_stays_away": (
        9,
        "deadlock: 31 threads at a product that other lanes have not begun|lanes of a warp disagree",
    ),
}


def run_wrong(kind: int, seed: int) -> str:
    """What the machine says of the kernel `wrong`; nothing if its result is right."""
    x = normal(1, 64, 1, 64, dtype=BF16)
    d = np.zeros((128, 32), np.float32)
    draw(seed)
    if told := run(functions(), "probe_wrong", kind, (x, 64, 64), d):
        return told
    if np.isnan(d).any():
        return "NaN"
    exact = to_registers((x[0, :, 0, :16].double() @ x[0, :, 0, :16].double().T).float())
    torch.testing.assert_close(torch.from_numpy(d), exact, rtol=1e-5, atol=1e-4)
    return ""


def test_a_right_kernel_is_right_whatever_the_order() -> None:
    assert {run_wrong(0, seed) for seed in range(48)} == {""}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_reported(name: str) -> None:
    kind, report = WRONG[name]
    told = {run_wrong(kind, seed) for seed in range(24)}
    told -= {""} if name == "copy_is_not_waited_for" else set()  # a copy may land in time by luck
    assert told and all(re.search(report, text) for text in told), told


NOT_WAITED_FOR = r"touched where a copy has not been waited for \(cp.async.wait_group\)"
WRONG_STAGES = {  # as above, of the kernel `wrong_stages`
    "unwaited": (1, NOT_WAITED_FOR),
    "fewer_groups_are_waited_for": (2, NOT_WAITED_FOR),
    "no_barrier_behind_the_wait": (3, "without a barrier after its wait|two copies to one place|" + NOT_WAITED_FOR),
    "only_the_warp_meets": (4, "without a barrier after its wait|two copies to one place|" + NOT_WAITED_FOR),
    "a_stage_is_overwritten_too_early": (5, "two copies to one place|" + NOT_WAITED_FOR),
    "never_waited_for": (6, "a thread ends with copies that it never waited for"),
    "two_copies_to_one_place": (7, "two copies to one place"),
    "a_lane_stays_away": (8, "lanes of a warp meet in different operations|deadlock: .*threads at mma.sync"),
}


def run_wrong_stages(kind: int, seed: int) -> str:
    x = normal(5, 64, 64, dtype=BF16)
    d = np.zeros((128, 32), np.float32)
    draw(seed)
    if told := run(functions(), "probe_wrong_stages", kind, x, 5, d):
        return told
    if np.isnan(d).any():
        return "NaN"
    exact = to_registers((x.double() @ x.double().mT).sum(0).float())
    torch.testing.assert_close(torch.from_numpy(d), exact, rtol=1e-5, atol=1e-3)
    return ""


def test_right_stages_are_right_whatever_the_order() -> None:
    assert {run_wrong_stages(0, seed) for seed in range(24)} == {""}


@pytest.mark.parametrize("name", WRONG_STAGES)
def test_wrong_stages_are_reported(name: str) -> None:
    kind, report = WRONG_STAGES[name]
    told = {run_wrong_stages(kind, seed) for seed in range(12)}
    assert all(re.search(report, text) for text in told), told


OVERWRITTEN = "shared memory is overwritten that a reduction has not read|a reduction reads ordinary writes|wrong sums"
WRONG_REDUCTIONS = {  # as above, of the kernel `wrong_reduction`
    "not_fenced": (1, "a reduction reads ordinary writes that were not fenced"),
    "not_read_when_it_is_overwritten": (2, OVERWRITTEN),
    "never_waited_for": (3, "a thread ends with reductions that it never waited for"),
    "not_committed": (4, OVERWRITTEN + "|a thread ends with reductions"),
    "threads_do_not_meet": (5, OVERWRITTEN),
    "not_in_16s": (6, "a reduction is not in 16s"),
}


def run_wrong_reduction(kind: int, seed: int) -> str:
    x, sums = normal(256).numpy(), np.zeros(128, np.float32)
    draw(seed)
    if told := run(functions(), "probe_wrong_reduction", kind, x, sums):
        return told
    return "" if np.allclose(sums, x[:128] + x[128:]) else "wrong sums"


def test_a_right_reduction_is_right_whatever_the_order() -> None:
    assert {run_wrong_reduction(0, seed) for seed in range(24)} == {""}


@pytest.mark.parametrize("name", WRONG_REDUCTIONS)
def test_a_wrong_reduction_is_reported(name: str) -> None:
    kind, report = WRONG_REDUCTIONS[name]
    told = {run_wrong_reduction(kind, seed) for seed in range(24)}
    told -= {""}  # a reduction may be there in time by luck
    assert told and all(re.search(report, text) for text in told), told


def test_a_launch_made_ahead_waits_for_the_one_before() -> None:
    for kind, told in enumerate(("", *2 * ["threads ended that did not wait for the launch before"])):
        x, y = normal(128).numpy(), np.zeros(128, np.float32)
        found = run(functions(), "probe_wrong_launch", kind, x, y)
        assert told in found if told else not found
