"""What a results file says of each bar: reached, missed, or why it is open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .workload import Bar, Workload

Results = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    measured: float | None  # in the unit of the bar
    met: bool | None  # None: open
    reason: str = ""  # why it is open


def systems(results: Results, workload: str) -> dict[str, Any]:
    """By name; what `winners` measured again stands in place of what `bench` had, but not where it came to nothing."""
    found: dict[str, Any] = {}
    for stage in ("bench", "winners"):
        again = results["stages"].get(stage, {}).get("workloads", {}).get(workload, {}).get("systems", {})
        found |= {name: one for name, one in again.items() if not found or one["status"] != "skipped"}
    return found


def ceilings(results: Results) -> dict[str, float]:
    return results["stages"].get("bench", {}).get("ceilings", {})


def size(results: Results, workload: str, what: str) -> float:
    """FLOPs or bytes ("moved") of a call."""
    return results["stages"].get("bench", {}).get("workloads", {}).get(workload, {}).get(what, 0.0)


def seconds(found: Mapping[str, Any], name: str) -> float | None:
    record = found.get(name, {})
    return record["seconds"]["median"] if record.get("status") == "measured" else None


def judge(bar: Bar, workload: Workload, results: Results) -> Verdict:
    if results["rehearsal"]:
        return Verdict(None, None, "a rehearsal measures nothing")
    found = systems(results, workload.name)
    ours = seconds(found, bar.backend)
    if ours is None:
        record = found.get(bar.backend, found.get("all", {}))
        return Verdict(None, None, f"{bar.backend}: {record.get('reason', 'not measured')}")
    if bar.against == "":
        return Verdict(ours, ours <= bar.value)
    if bar.against == "kernel":
        kernel = found[bar.backend].get("kernel_seconds")
        if kernel is None:
            return Verdict(None, None, found[bar.backend].get("without_facts", "the kernel alone was not measured"))
        return Verdict(ours - kernel, ours - kernel <= bar.value)
    if bar.against == "copy":
        copy, moved = ceilings(results).get("copy_bytes"), size(results, workload.name, "moved")
        return ratio(bar, moved / ours, copy) if copy else Verdict(None, None, "the copy bandwidth was not measured")
    theirs = held_against(bar, found, results)
    if theirs is None:
        return Verdict(None, None, f"{bar.against.removeprefix('workload:')}: not measured")
    return ratio(bar, theirs, ours)


def ratio(bar: Bar, a: float, b: float) -> Verdict:
    return Verdict(a / b, a / b >= bar.value)


def held_against(bar: Bar, found: Mapping[str, Any], results: Results) -> float | None:
    """Seconds of what the bar compares with."""
    if bar.against.startswith("workload:"):
        return seconds(systems(results, bar.against.removeprefix("workload:")), bar.backend)
    if bar.against in ("best peer", "padded best"):
        prefix = "padded" if bar.against == "padded best" else ""
        peers = [name for name, one in found.items() if name.startswith(prefix) and not one.get("ours")]
        times = [seconds(found, name) for name in peers]
        return min((t for t in times if t is not None), default=None)
    return seconds(found, bar.against)
