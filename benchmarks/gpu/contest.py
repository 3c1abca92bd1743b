"""Which of several ways to do the same is fastest, as far as the noise lets one tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple, Protocol, TypeVar

from duplex_attn.profile.timing import Spread, speed

GAIN = 0.02  # of the time: less is left alone
SECONDS = 0.1  # of measuring one way of one workload
AGAIN = 4  # times as long, for the two that are left
SURE = 2  # standard errors

Way = TypeVar("Way", bound=Hashable)


class Clock(Protocol):
    def warm(self) -> None: ...

    def rounds(self, calls: Mapping[Any, Callable[[], Any]], seconds: float) -> dict[Any, list[float]]: ...


class Found(NamedTuple):
    way: Any
    seconds: float  # the geometric mean of its medians over the workloads
    gain: float  # times as fast as the one in use


def fastest(current: Way, others: Sequence[Way], workloads: Sequence[Callable[[Way], Any]], clock: Clock) -> Found:
    """One call of `workloads` does that workload in the given way.

    All ways take turns, and the workloads count alike. Of many that are as fast as the one in use, the best would look better than it is;
    so it is measured once more against that one alone, and must be faster beyond the noise.
    """
    clock.warm()
    first = measured((current, *others), workloads, clock, SECONDS)
    best = max((current, *others), key=lambda way: gain_of(first, way, current)[0])
    if best != current:
        alone = measured((current, best), workloads, clock, AGAIN * SECONDS)
        gain, error = gain_of(alone, best, current)
        if gain > 1 + GAIN and gain - SURE * error > 1:
            return Found(best, typical(alone, best), gain)
    return Found(current, typical(first, current), 1.0)


Samples = list[dict[Any, list[float]]]  # of each workload, the seconds of each way round by round


def measured(ways: Sequence[Way], workloads: Sequence[Callable[[Way], Any]], clock: Clock, seconds: float) -> Samples:
    return [
        clock.rounds({way: lambda way=way, work=work: work(way) for way in ways}, seconds * len(ways))
        for work in workloads
    ]


def gain_of(samples: Samples, way: Any, current: Any) -> tuple[float, float]:
    """How many times as fast, from the rounds' own ratios, and the standard error of that."""
    ratios = [speed(of_one, way, current) for of_one in samples]
    rounds = [len(of_one[way]) for of_one in samples]
    # Of a median, with normal noise: 1.25 standard deviations over sqrt(n), and quartiles are 1.35 of them apart.
    errors = [(x.q3 - x.q1) / x.median * 1.25 / 1.35 / math.sqrt(n) for x, n in zip(ratios, rounds, strict=True)]
    gain = geometric_mean([x.median for x in ratios])
    return gain, gain * math.hypot(*errors) / len(errors)


def typical(samples: Samples, way: Any) -> float:
    return geometric_mean([Spread.of(of_one[way]).median for of_one in samples])
