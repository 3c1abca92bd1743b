"""The clock and the memory meter behind every reported number."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from duplex_attn.profile.memory import peak_memory
from duplex_attn.profile.timing import Spread, interleaved, once, speed

CPU = torch.device("cpu")
MIB = 2**20


def test_rounds_interleave_and_take_turns_at_being_first() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleaved(calls, rounds=3, device=CPU, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_once_is_the_mean_of_its_repeats() -> None:
    assert 0.01 <= once(lambda: time.sleep(0.01), CPU, repeat=3) < 0.1


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_speed_is_the_spread_of_ratios_not_the_ratio_of_medians() -> None:
    seconds = {"ours": [1.0, 2.0, 10.0], "peer": [2.0, 6.0, 10.0]}
    assert speed(seconds, "ours", "peer").median == 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("count", [4, 64])
def test_peak_memory_sees_what_a_call_holds_at_once(count: int) -> None:
    def call() -> None:
        held = [torch.ones(MIB // 4) for _ in range(count)]
        del held
        torch.ones(MIB // 4)

    call()
    peak = peak_memory(call, CPU)
    assert peak is not None
    assert count * MIB - MIB / 2 <= peak <= (count + 4) * MIB
