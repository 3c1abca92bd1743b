"""From the results of cards to attn/evidence.json: which backends pass there, and how fast each is for a class of shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import geometric_mean
from typing import Any

from duplex_attn.backends import names_for
from duplex_attn.evidence import shape_class

from .registry import workloads
from .verdict import Results, seconds, systems
from .workload import Workload

KINDS = {"dense": "forward", "packed": "forward", "backward": "backward", "biased": "backward", "decode": "paged"}


def evidence(results: Results) -> dict[str, Any]:
    """Of one card."""
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for workload in workloads():
        if (shape := class_of(workload)) is None:
            continue
        found = systems(results, workload.name)
        times = {name: t for name, one in found.items() if one.get("ours") and (t := seconds(found, name))}
        for name, taken in times.items():
            ratios[shape][name].append(taken / min(times.values()))
    times_of = {
        shape: {name: round(geometric_mean(found), 3) for name, found in sorted(by_name.items())}
        for shape, by_name in sorted(ratios.items())
    }
    return {"failing": failing(results), "times": times_of}


def class_of(w: Workload) -> str | None:
    kind = KINDS.get(w.family)
    if kind is None:
        return None
    bits = 8 * (w.stored or w.dtype).itemsize
    return shape_class(kind, w.distance_radius > 0, bits, w.head_dim, w.queries)


def failing(results: Results) -> list[str]:
    """Backends of which a test failed, told by the lane in the test's name, or which gave a workload wrong numbers."""
    test = results["stages"].get("test", {})
    failed = [one["test"] for one in (*test.get("failures", ()), *test.get("others", {}).get("failures", ()))]
    found = {name for name in names_for("cuda") if any(re.search(rf"\[{name}-cuda", one) for one in failed)}
    for stage in ("bench", "winners"):
        for workload in results["stages"].get(stage, {}).get("workloads", {}).values():
            bad = ("wrong", "failed", "crashed")
            found |= {name for name, one in workload["systems"].items() if one.get("ours") and one["status"] in bad}
    return sorted(found)
