"""From the results of cards to attn/evidence.json: which backends pass there, and how fast each is for a class of shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

from duplex_attn.backends import names_for
from duplex_attn.evidence import moving_class, shape_class

from .registry import workloads
from .verdict import Results, seconds, systems
from .workload import Workload

KINDS = {"dense": "forward", "packed": "forward", "backward": "backward", "biased": "backward", "decode": "paged"}
GIVEN: dict[str, Callable[[Workload], int]] = {  # rows that a call is given which only moves numbers
    "append": lambda w: 2 * w.batch * w.queries * w.kv,
    "merge": lambda w: w.parts * w.batch * w.queries * w.heads,
    "copy": lambda w: 2 * w.pages * w.page_size * w.kv,
}


def evidence(results: Results) -> dict[str, Any]:
    """Of one card."""
    contests: dict[str, list[dict[str, float]]] = defaultdict(list)
    for workload in workloads():
        if (shape := class_of(workload)) is None:
            continue
        found = systems(results, workload.name)
        contests[shape].append(
            {name: t for name, one in found.items() if one.get("ours") and (t := seconds(found, name))}
        )
    times_of = {shape: times for shape, found in sorted(contests.items()) if (times := ratios(found))}
    return {"failing": failing(results), "times": times_of}


def ratios(contests: list[dict[str, float]]) -> dict[str, float]:
    """Of each backend its times over the fastest's. Where several met, only what all of them ran counts: one that ran alone was not
    the faster for it."""
    names = sorted({name for times in contests for name in times})
    together = [times for times in contests if len(times) == len(names)] or [times for times in contests if times]
    return {
        name: round(geometric_mean([times[name] / min(times.values()) for times in together if name in times]), 3)
        for name in names
        if any(name in times for times in together)
    }


def class_of(w: Workload) -> str | None:
    """As the package classes the calls of this workload; None where it is a model, of Python, or of a rarer kind of call that the
    package does not tell from others."""
    if w.deterministic:
        return None
    bits = 8 * (w.stored or w.dtype).itemsize
    if w.family in GIVEN:
        return moving_class(w.family, bits, w.head_dim, GIVEN[w.family](w) * w.head_dim * w.dtype.itemsize)
    kind = KINDS.get(w.family)
    return kind and shape_class(kind, w.terms, bits, w.head_dim, w.queries)


def failing(results: Results) -> list[str]:
    """Backends of which a test failed, told by the lane in the test's name, or which gave a workload wrong numbers.

    What ran on a card in tests/emulation are the CUDA kernels, save in the tests of primitives alone.
    """
    test = results["stages"].get("test", {})
    failed = [one["test"] for one in (*test.get("failures", ()), *test.get("others", {}).get("failures", ()))]
    names = names_for("cuda")
    found = {name for name in names if any(re.search(rf"[\[-]{name}-cuda[-\]]", one) for one in failed)}
    if any(re.match(r"tests/emulation/(?!test_machine\.py).*[\[-]card[-\]]", one) for one in failed):
        found.add("cuda")
    for stage in ("bench", "winners"):
        for workload in results["stages"].get(stage, {}).get("workloads", {}).values():
            bad = ("wrong", "failed", "crashed")
            found |= {name for name in names if workload["systems"].get(name, {}).get("status") in bad}
    return sorted(found)
