"""Measures again, with the winners of `tune`, the workloads that they serve, beside the peers that matter there."""

from __future__ import annotations

from typing import Any

import torch

from ..registry import workloads
from ..settings import Settings
from ..store import Store
from .bench import BACKENDS, measure_all
from .tune import FAMILIES, table_of


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    won = {name.split()[0] for name in store.stage("tune").get("winners", {})}
    if not won:
        record.update(status="skipped", reason="tune found nothing faster")
        return
    table_of(torch.device(settings.device), settings.tuning)
    families = {FAMILIES[kernel] for kernel in won}
    chosen = [w for w in workloads() if w.family in families]
    measure_all(settings, store, record, deadline, chosen, peers_that_matter(store))


def peers_that_matter(store: Store) -> set[str]:
    """Those that a bar names, and whichever was fastest somewhere."""
    found = {bar.against for w in workloads() for bar in w.bars}
    for workload in store.stage("bench").get("workloads", {}).values():
        times = {
            name: one["seconds"]["median"]
            for name, one in workload["systems"].items()
            if one["status"] == "measured" and name not in BACKENDS
        }
        found |= {min(times, key=lambda name: times[name])} if times else set()
    return found
