"""What `tune` found and a second look does not bear out: an entry of the card's table with which its workloads are slower than before.

A contest measures few workloads of an entry; `winners` measures all that it serves. Another minute is another speed of the card, and
what the other systems took in both tells how much of a difference is that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import geometric_mean
from typing import Any

from .verdict import seconds

TUNED = "triton"
Systems = Mapping[str, Any]


def speed(before: Mapping[str, Any], now: Mapping[str, Any], workloads: Iterable[str]) -> float | None:
    """Times as fast as before over workloads of the two stages' records, 0 where one went wrong; None where none was measured twice."""
    found: list[float] = []
    for name in workloads:
        systems = [stage.get("workloads", {}).get(name, {}).get("systems", {}) for stage in (before, now)]
        if seconds(systems[0], TUNED) is None or TUNED not in systems[1]:
            continue
        if systems[1][TUNED]["status"] in ("wrong", "failed", "crashed"):
            return 0.0
        if gain := ratio(*systems, TUNED):
            others = [x for other in systems[0] if other != TUNED and (x := ratio(*systems, other))]
            found.append(gain / (geometric_mean(others) if others else 1.0))
    return geometric_mean(found) if found else None


def ratio(before: Systems, now: Systems, name: str) -> float | None:
    then, today = seconds(before, name), seconds(now, name)
    return then / today if then and today else None
