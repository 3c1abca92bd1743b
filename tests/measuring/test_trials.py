"""A configuration on trial meets the launches that were found for it, and none of another's."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from duplex_attn.kernels import launch, tuning

from benchmarks.gpu.trials import Trials

ENTRY = ("interpreter", "forward", 16, 64)


def in_force() -> tuning.Config:
    return tuning.config("forward", "interpreter", 16, 64)


def test_each_configuration_searches_once_for_its_kernels() -> None:
    current = in_force()
    trials, searched = Trials(*ENTRY), []

    def call() -> int:
        """As a launch: found under its arguments, which say nothing of the tile, or searched for."""
        if "arguments" not in launch._bound:
            searched.append(in_force().block_m)
            launch._bound["arguments"] = [lambda addresses, tensors, m=searched[-1]: m]
        return launch._bound["arguments"][0]([], [])

    for m in (64, 128, 64, 32, 128, 64, 32):
        assert trials.call(current._replace(block_m=m), call) == m
    assert searched == [64, 128, 32]
    assert "arguments" not in launch._bound and in_force() == current


def test_a_call_that_fails_leaves_the_table_as_it_was() -> None:
    current = in_force()

    def call() -> None:
        raise RuntimeError("out of resource: shared memory")

    with pytest.raises(RuntimeError, match="out of resource"):
        Trials(*ENTRY).call(current._replace(block_m=64), call)
    assert in_force() == current
