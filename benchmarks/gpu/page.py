"""The part of docs/performance.md that is about cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .registry import workloads
from .verdict import Results, ceilings, judge, seconds, size, systems
from .workload import Workload

MICRO, MILLI, TERA = 1e6, 1e3, 1e12


def without_cards() -> Iterator[str]:
    yield "Nothing has been measured on a card: every bar is open. `make gpu` on a machine with one measures them."
    yield ""
    with_bars = [workload for workload in workloads() if workload.bars]
    yield from table(("workload", "bars", "measured"), (
        (workload.name, "; ".join(map(str, workload.bars)), "not measured") for workload in with_bars
    ))  # fmt: skip


def of_card(results: Results, plot: str | None) -> Iterator[str]:
    machine, stages = results["machine"], results["stages"]
    bench = stages.get("bench", {})
    yield f"### {results['device']}"
    yield ""
    software = ", ".join(f"{name} {machine.get(name)}" for name in ("torch", "torch_cuda", "triton", "nvcc"))
    yield f"Commit {str(bench.get('commit'))[:12]}, {bench.get('at', 'not measured')}; {software}."
    for line in sorted({line for stage in results["stages"].values() for line in stage.get("conditions", ())}):
        yield f"Note: {line}."
    yield ""
    yield from table(("stage", "status", "seconds", ""), (
        (name, stage["status"], f"{stage['seconds']:.0f}", stage.get("reason", "")) for name, stage in stages.items()
    ))  # fmt: skip
    top = ceilings(results)
    if top:
        yield (
            f"The card's own ceilings in the same run: {top['matmul_flops'] / TERA:.0f} TFLOP/s of a bf16 matrix product, "
            f"{top['copy_bytes'] / TERA:.2f} TB/s of a copy (read + written), {top['read_bytes'] / TERA:.2f} TB/s of a read."
        )
        yield ""
    if plot:
        yield f"![Speed of each system on {results['device']}]({plot})"
        yield ""
    yield from table(("workload", "bar", "measured", "met"), verdicts(results))
    yield from table(("workload", "system", "median", "quartiles", "achieved", "of the ceiling"), measured(results))
    yield from table(("skipped or wrong", "why", "workloads"), passed_over(results))
    yield from findings(stages)


def table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |"
    yield ""


def verdicts(results: Results) -> Iterator[tuple[str, ...]]:
    for workload in workloads():
        for bar in workload.bars:
            found = judge(bar, workload, results)
            if found.measured is None:
                yield workload.name, str(bar), "not measured", found.reason
                continue
            in_seconds = bar.against in ("", "kernel")
            shown = f"{found.measured * MICRO:.1f} us" if in_seconds else f"{found.measured:.2f}"
            yield workload.name, str(bar), shown, "yes" if found.met else "no"


def measured(results: Results) -> Iterator[tuple[str, ...]]:
    for workload in workloads():
        found = systems(results, workload.name)
        times = {name: t for name in found if (t := seconds(found, name)) is not None}
        for name in sorted(times, key=lambda name: times[name]):
            spread = found[name]["seconds"]
            quartiles = f"{spread['q1'] * MILLI:.3f} to {spread['q3'] * MILLI:.3f}"
            achieved, share = of_ceiling(results, workload, times[name])
            yield workload.name, name, f"{times[name] * MILLI:.3f} ms", quartiles, achieved, share


def of_ceiling(results: Results, workload: Workload, taken: float) -> tuple[str, str]:
    """By what bounds it: the operations, or the bytes where moving them takes longer."""
    top = ceilings(results)
    flops, moved = size(results, workload.name, "flops"), size(results, workload.name, "moved")
    if not top or not (flops or moved):
        return "", ""
    if flops / top["matmul_flops"] >= moved / top["copy_bytes"]:
        return f"{flops / taken / TERA:.0f} TFLOP/s", f"{flops / taken / top['matmul_flops']:.0%}"
    return f"{moved / taken / TERA:.2f} TB/s", f"{moved / taken / top['copy_bytes']:.0%}"


def passed_over(results: Results) -> Iterator[tuple[str, ...]]:
    """One row a system and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for workload in workloads():
        for name, one in systems(results, workload.name).items():
            if one["status"] != "measured":
                found.setdefault((name, f"{one['status']}: {one['reason']}"), []).append(workload.name)
    for (name, why), names in found.items():
        yield name, why, f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def findings(stages: dict[str, Any]) -> Iterator[str]:
    flex = stages.get("build", {}).get("flex", {})
    yield from table(("FlexAttention's first call, compiling", "seconds"), (
        (name, f"{seconds:.1f}") for name, seconds in flex.items()
    ))  # fmt: skip
    test, sanitize, tune, winners = (stages.get(name, {}) for name in ("test", "sanitize", "tune", "winners"))
    if "passed" in test:
        others = test.get("others", {})
        known = "reason" in others or "not_run" in others or test.get("status") != "cut"
        late = "all but those that come first" if "reason" in others else others.get("not_run", 0)
        told = f"{late} had no time to run" if known else "how many more had no time to run is not known"
        yield f"Tests: {test['passed'] + others.get('passed', 0)} passed, {told}."
        yield ""
        failures = [*test["failures"], *others.get("failures", ())]
        yield from table(("failed", ""), ((f"`{one['test']}`", one["message"].splitlines()[0]) for one in failures))
        late = [*test.get("late", ()), *others.get("late", ())]
        yield from table(("not ended in time, neither passed nor failed",), ((f"`{one['test']}`",) for one in late))
        skips = {**test["skips"], **others.get("skips", {})}
        yield from table(("skipped tests", "why"), ((str(count), why) for why, count in skips.items()))
    if "tools" in sanitize:
        yield from table(("sanitizer", "status", ""), (
            (tool, found["status"], found["reason"]) for tool, found in sanitize["tools"].items()
        ))  # fmt: skip
    out = winners.get("taken_out", {})
    kept = {name: gain for name, gain in tune.get("gains", {}).items() if name not in out}
    yield from table(("tuned", "faster by"), ((name, f"{gain - 1:.0%}") for name, gain in kept.items()))
    yield from table(("taken out again: with it over all its workloads", "times as fast"), (
        (name, f"{found:.2f}") for name, found in out.items()
    ))  # fmt: skip
