"""Times every workload with every backend and every peer; what is measured stays measured when the stage is cut short."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from duplex_attn.backends import BACKENDS, names_for
from duplex_attn.profile.timing import Spread

from ..clock import Clock
from ..families import build
from ..registry import workloads
from ..settings import Settings
from ..store import Store
from ..workload import Peer, Problem, Unavailable, Workload

SECONDS = 0.12  # of measuring a system
AS_CHOSEN = "duplex-attn"
TENSORS, TIMING = "its tensors", "timing all together"  # what a process may be at besides one system
PATIENCE = 4  # times that a system may end a process before it is passed over everywhere; being stuck counts double
Record = dict[str, Any]


def run(settings: Settings, store: Store, record: Record, deadline: float) -> None:
    measure_all(settings, store, record, deadline, workloads(), None)


def measure_all(
    settings: Settings, store: Store, record: Record, deadline: float, chosen: list[Workload], peers: set[str] | None
) -> None:
    """`peers` limits the other systems to those named."""
    device = torch.device(settings.device)
    clock = Clock(device, settings.tiny)
    clock.warm()
    record.setdefault("workloads", {})
    record["ceilings"] = clock.ceilings()
    store.save()
    wanted = [w for w in chosen if settings.wants(w.name)]
    tried: dict[Workload, str] = {}
    for n, workload in enumerate(wanted):
        if time.monotonic() > deadline:
            record.update(status="cut", reason=f"time was over before {len(wanted) - n} of {len(wanted)} workloads")
            return
        found = record["workloads"].setdefault(workload.name, {"systems": {}})
        if settings.tiny:
            name, workload = workload.name, workload.tiny()
            same = tried.setdefault(replace(workload, name=""), name)
            if same != name:
                found["systems"]["all"] = {"status": "skipped", "reason": f"in little it is {same}"}
                continue
        if not found.get("complete"):
            measure(workload, clock, store, record, found, peers)
    for name, found in record["workloads"].items():
        for system, one in found["systems"].items():
            if one.get("ours") and one["status"] in ("wrong", "failed", "crashed"):
                record.update(status="failed", reason=f"{name}: {system}: {one['reason']}")


def measure(w: Workload, clock: Clock, store: Store, record: Record, found: Record, peers: set[str] | None) -> None:
    systems: Record = found["systems"]
    crashed = {what: why for workload, what, why in crashes(record) if workload == w.name}

    def watched(what: str) -> AbstractContextManager[None]:
        return watch(store, record, f"{w.name}: {what}")

    with watched(TENSORS):
        try:
            if TENSORS in crashed:
                raise Unavailable(crashed[TENSORS])
            problem = build(w, clock.device)
        except (torch.OutOfMemoryError, Unavailable) as error:
            systems["all"] = {"status": "skipped", "reason": in_short(error)}
        except Exception as error:
            abort_unless_it_works(clock.device, error)
            systems["all"] = {"status": "failed", "reason": in_short(error), "ours": True}
    if "all" not in systems:
        found.update(flops=problem.flops, moved=problem.moved)
        calls: dict[str, Callable[[], Any]] = {}
        hopeless = without_hope(record)
        for name, make, is_ours in candidates(problem, clock.device, peers):
            with watched(name):
                if name in crashed:
                    systems[name], call = {"status": "crashed", "reason": crashed[name]}, None
                elif name in hopeless:
                    systems[name], call = {"status": "skipped", "reason": "its process died in other workloads"}, None
                else:
                    systems[name], call = first_call(problem, make, is_ours, clock)
            if is_ours:
                systems[name]["ours"] = True
            if call is not None:
                calls[name] = call
        # Together, so that all see the same minute; where that killed a process before, each by itself.
        for names in [[name] for name in calls] if TIMING in crashed else [list(calls)]:
            with watched(names[0] if len(names) == 1 else TIMING):
                time_some(problem, {name: calls[name] for name in names}, systems, clock)
    found["complete"] = True
    store.save()
    times = {name: one["seconds"]["median"] for name, one in systems.items() if "seconds" in one}
    shown = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in times.items())
    print(f"  {w.name}: {shown or 'nothing was measured'}", flush=True)


def crashes(record: Record) -> Iterator[tuple[str, str, str]]:
    """What a process was at when it died: the workload, the system or what else it was, and why it died."""
    for died in record.get("crashed", ()):
        workload, _, what = died.partition(": ")
        yield workload, what, next((why for why in record.get("crashes", ()) if died in why), "its process died")


def without_hope(record: Record) -> set[str]:
    """Systems that have cost enough processes."""
    counts: Counter[str] = Counter()
    for _, system, why in crashes(record):
        counts[system] += 2 if "took more than" in why else 1
    return {system for system, count in counts.items() if count >= PATIENCE}


def time_some(problem: Problem, calls: dict[str, Callable[[], Any]], systems: Record, clock: Clock) -> None:
    try:
        samples = clock.rounds(calls, SECONDS * len(calls), problem.on_host) if calls else {}
    except Exception as error:  # out of memory, where each alone had room
        abort_unless_it_works(clock.device, error)
        for name in calls:
            systems[name] |= {"status": "skipped", "reason": f"when it was timed: {in_short(error)}"}
        return
    for name, seconds in samples.items():
        spread = Spread.of([s / problem.repeat for s in seconds])
        measured = {"median": spread.median, "q1": spread.q1, "q3": spread.q3, "rounds": len(seconds)}
        systems[name] |= {"status": "measured", "reason": "", "seconds": measured}
        if systems[name].get("ours"):
            try:
                systems[name] |= problem.facts(calls[name])
            except Exception as error:
                systems[name]["without_facts"] = in_short(error)


def backends(device: torch.device) -> list[str]:
    """Those that run something on this device, though not every call; the reference is the formula, not a contender."""
    ready = [b for b in BACKENDS.values() if b.name != "reference" and b.missing() is None]
    if device.type == "cuda":
        return [b.name for b in ready if b.name in names_for("cuda")]
    probe = torch.empty(1, 1, 1, 1, device=device)
    return [b.name for b in ready if b.refuses_merge((probe,)) is None]


def candidates(
    problem: Problem, device: torch.device, peers: set[str] | None
) -> Iterator[tuple[str, Callable[[], Peer], bool]]:
    """Name, what makes it, and whether it is ours."""
    for name in [AS_CHOSEN] if problem.as_chosen else backends(device):
        yield name, lambda name=name: Peer(problem.ours(name)), True
    for name, make in problem.peers.items():
        if peers is None or name in peers:
            yield name, make, False


def first_call(
    problem: Problem, make: Callable[[], Peer], is_ours: bool, clock: Clock
) -> tuple[Record, Callable[[], Any] | None]:
    """The record of a system that is about to be timed, with its call; or why it will not be."""
    try:
        begin = time.perf_counter()
        peer = make()
        answer = peer.answer(peer.call())
        clock.wait()
        first = time.perf_counter() - begin
        if not peer.checked:
            return waiting(first), peer.call
        check = problem.check(answer)
    except Unavailable as error:
        return {"status": "skipped", "reason": in_short(error)}, None
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"status": "skipped", "reason": in_short(error)}, None
    except Exception as error:  # whatever a peer raises
        abort_unless_it_works(clock.device, error)
        refused = isinstance(error, (ValueError, TypeError)) and str(error).startswith("backend:")
        status = "skipped" if refused or not is_ours else "failed"
        return {"status": status, "reason": in_short(error)}, None
    record = waiting(first) | {"difference": check.difference, "allowed": check.allowed}
    if not check.passes(is_ours):
        return record | {"status": "wrong", "reason": str(check)}, None
    return record, peer.call


class Broken(Exception):
    """After an illegal access, say, this process can measure nothing more: another one goes on."""


def abort_unless_it_works(device: torch.device, error: Exception) -> None:
    if not works(device):
        raise Broken(in_short(error)) from error


def works(device: torch.device) -> bool:
    """Not after an illegal access, say, of which every later call would be accused."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def waiting(first: float) -> Record:
    """Of a system that works and was not timed yet."""
    return {"status": "skipped", "reason": "the stage ended before it was timed", "first_call_seconds": round(first, 3)}


@contextmanager
def watch(store: Store, record: Record, what: str) -> Iterator[None]:
    """Should the process die here, or be stuck, its successor knows of what."""
    record.update(running=what, since=time.time())
    store.save()
    try:
        yield
    except Broken as error:
        record["said"] = str(error)
        store.save()
        os.abort()
    del record["running"], record["since"]


def in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0][:300]}"
