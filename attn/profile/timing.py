"""Times several systems side by side, so that whatever disturbs the machine disturbs each of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3)


def once(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Seconds of one call, averaged over `repeat` of them; all work on the device is done when the clock stops."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    wait(device)
    return (time.perf_counter() - start) / repeat


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    repeat: int = 1,
    each: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round. A round runs each call once, beginning with another one each time.

    The warm-up rounds are run and not kept; `each` is called after every call, warm-up too.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        for name in in_turn(names, index):
            taken = once(calls[name], device, repeat)
            if index >= 0:
                seconds[name].append(taken)
            each()
    return seconds


def in_turn(names: Sequence[Name], index: int) -> list[Name]:
    """The order of that round: each begins with another one, so that none always follows the same."""
    first = index % max(1, len(names))
    return [*names[first:], *names[:first]]


def speed(seconds: Mapping[str, Sequence[float]], system: str, peer: str) -> Spread:
    """How many times as fast as `peer` the system is: the spread of the rounds' own ratios."""
    return Spread.of([theirs / ours for ours, theirs in zip(seconds[system], seconds[peer], strict=True)])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
