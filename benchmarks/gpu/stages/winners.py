"""Measures again, with the winners of `tune`, the workloads that they serve, beside the peers that matter there; and takes out of the
table again what is slower there than what it took the place of."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from duplex_attn.kernels import tuning

from ..parts import in_parts
from ..registry import workloads
from ..second_look import speed
from ..settings import Settings
from ..store import Store, is_of_this
from ..workload import Workload
from .bench import measure_all
from .build import call_all, call_workload, workload_of
from .tune import entry_of, keep, serves, table_of

COMPILING = 0.4  # of the stage's time, at most


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    table = table_of(torch.device(settings.device), settings.tuning)
    won = in_use(store, table)
    if not won:
        record.update(status="skipped", reason="tune found nothing faster")
        return
    if record.get("table") != tuning.tables()[table]:  # what an interrupted run measured was another table's
        record.update(table=tuning.tables()[table], workloads={})
    served = {name: [w.name for w in workloads() if serves(name, sized(w, settings))] for name in won}
    chosen = [w for w in workloads() if any(w.name in names for names in served.values())]
    if settings.device == "cuda" and "compiled" not in record:
        begin = time.monotonic()
        names = [w.name for w in chosen]
        compiled, _ = in_parts(settings, "winners", store.path, names, begin + COMPILING * (deadline - begin))
        record["compiled"] = {one["workload"]: one["seconds"] for one in compiled}
    measure_all(settings, store, record, deadline, chosen, peers_that_matter(store))
    take_out_the_slower(settings, store, record, table, served)


def part(settings: Settings, deadline: float) -> int:
    """Calls its share of the workloads once, with the winners: `tune` compiled them for few calls of those that they serve."""
    device = torch.device(settings.device)
    table_of(device, settings.tuning)
    return call_all(
        settings, deadline, lambda name: call_workload(replace(workload_of(name, settings), flex=False), device)
    )


def sized(w: Workload, settings: Settings) -> Workload:
    return w.tiny() if settings.tiny else w


def in_use(store: Store, table: str) -> list[str]:
    """Entries that `tune` found and the table still has."""
    found = store.data["stages"].get("tune", {}).get("winners", {})
    held = {name: entry_of(table, name) or {} for name in found}
    return [name for name, winner in found.items() if held[name] and held[name].items() <= winner.items()]


def take_out_the_slower(
    settings: Settings, store: Store, record: dict[str, Any], table: str, served: dict[str, list[str]]
) -> None:
    """What was in use before is put back, and what was measured without it stands."""
    bench = store.data["stages"].get("bench", {})
    if not is_of_this(bench):
        return
    speeds = {name: speed(bench, record, names) for name, names in served.items()}
    slower = {name: found for name, found in speeds.items() if found is not None and found < 1}
    if not slower:
        return
    before = store.data["stages"]["tune"].get("before", {})
    keep(settings, table, {name: before.get(name) for name in slower}, store)
    record.setdefault("taken_out", {}).update({name: round(found, 3) for name, found in slower.items()})
    measured = record.setdefault("measured_with_what_was_taken_out", {})
    for workload in {workload for name in slower for workload in served[name]} & record["workloads"].keys():
        measured[workload] = record["workloads"].pop(workload)
    store.save()


def peers_that_matter(store: Store) -> set[str]:
    """Those that a bar names, and whichever was fastest somewhere."""
    found = {bar.against for w in workloads() for bar in w.bars}
    for workload in store.data["stages"].get("bench", {}).get("workloads", {}).values():
        times = {
            name: one["seconds"]["median"]
            for name, one in workload["systems"].items()
            if one["status"] == "measured" and not one.get("ours")
        }
        found |= {min(times, key=lambda name: times[name])} if times else set()
    return found
