"""Measures again, with the winners of `tune`, the workloads that they serve, beside the peers that matter there."""

from __future__ import annotations

from typing import Any

import torch
from duplex_attn.kernels import tuning

from ..registry import workloads
from ..settings import Settings
from ..store import Store
from .bench import measure_all
from .tune import MEASURED_BY, table_of


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    won = {name.split()[0] for name in store.data["stages"].get("tune", {}).get("winners", {})}
    if not won:
        record.update(status="skipped", reason="tune found nothing faster")
        return
    table = tuning.tables()[table_of(torch.device(settings.device), settings.tuning)]
    if record.get("table") != table:
        record.update(table=table, workloads={})  # what an interrupted run measured was another table's
    chosen = [w for w in workloads() if any(MEASURED_BY[kernel](w) for kernel in won)]
    measure_all(settings, store, record, deadline, chosen, peers_that_matter(store))


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
