"""`tune` follows a gain, and no noise. Clock and ways are played: a way is the seconds that it takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.contest import fastest


class PlayedClock:
    """Samples with noise, as many as a stage has time for; what is timed before anything has warmed the card is slow."""

    def __init__(self, noise: float, seed: int = 0) -> None:
        self.noise, self.random, self.warmed = noise, random.Random(seed), False

    def warm(self) -> None:
        self.warmed = True

    def rounds(self, calls: Mapping[Any, Callable[[], float]], seconds: float) -> dict[Any, list[float]]:
        assert self.warmed
        found: dict[Any, list[float]] = {way: [] for way in calls}
        for _ in range(int(12 * seconds / 0.1 / len(calls))):
            for way, call in calls.items():
                found[way].append(call() * self.random.lognormvariate(0, self.noise))
        return found


def takes(*seconds: float) -> list[Callable[[int], float]]:
    """One workload, in which way n takes the n-th of so many seconds."""
    return [lambda n: seconds[n]]


def test_ways_that_are_alike_change_nothing() -> None:
    """The best of thirteen samples is better than the first one without being faster."""
    moved = sum(fastest(0, range(1, 13), takes(*[1.0] * 13), PlayedClock(0.06, seed)).way != 0 for seed in range(200))
    assert moved <= 10


def test_a_gain_beyond_the_noise_is_found() -> None:
    seconds = [1.0] * 13
    seconds[7] = 0.9
    found = [fastest(0, range(1, 13), takes(*seconds), PlayedClock(0.05, seed)) for seed in range(50)]
    assert sum(one.way == 7 for one in found) >= 45
    assert all(1.02 < one.gain < 1.25 for one in found if one.way == 7)


def test_what_helps_one_workload_and_harms_another_more_is_left() -> None:
    work = [*takes(1.0, 0.9), *takes(1.0, 1.2)]
    assert fastest(0, [1], work, PlayedClock(0.01)).way == 0
    work = [*takes(1.0, 0.9), *takes(1.0, 1.01)]
    found = fastest(0, [1], work, PlayedClock(0.01))
    assert found.way == 1 and abs(found.gain - (1 / 0.9 / 1.01) ** 0.5) < 0.01
    assert abs(found.seconds - (0.9 * 1.01) ** 0.5) < 0.01


def test_less_than_two_percent_is_left() -> None:
    assert fastest(0, [1], takes(1.0, 0.985), PlayedClock(0.0)).way == 0
    assert fastest(0, [1], takes(1.0, 0.97), PlayedClock(0.0)).way == 1
