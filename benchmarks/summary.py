"""The bars of results files as tables: each bar of one machine, or a row a kind of workload with a column a machine, as the README
has it. Reads the files alone.

python benchmarks/summary.py benchmarks/results/<device>.json ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def table(results: Json) -> str:
    """One row a bar, or a sweep's worst and best."""
    lines = [f"| workload | bar | {results['device']} |", "|---|---|---|"]
    for (group, _), bars in kinds([results]).items():
        if bars[0]["sweep"]:
            lines.append(f"| {group}, {len(bars)} shapes | {targets(bars)} | {measured(bars)} |")
        else:
            lines += [f"| {group}: {bar['name']} | {targets([bar])} | {measured([bar])} |" for bar in bars]
    return "\n".join(lines)


def overview(files: list[Json]) -> str:
    """One row a kind of workload. Files of one device are one column, parts behind the rest."""
    devices: dict[str, list[Json]] = {}
    for one in sorted(files, key=lambda one: "part" in one):
        devices.setdefault(one["device"], []).append(one)
    columns = [kinds(of_device) for of_device in devices.values()]
    lines = [f"| workload | bars | {' | '.join(devices)} |", "|---" * (2 + len(devices)) + "|"]
    for kind in dict.fromkeys(kind for column in columns for kind in column):
        bars = next(column[kind] for column in columns if kind in column)
        name = f"{kind[0]}: {bars[0]['name']}" if len(bars) == 1 else f"{kind[0]}, {len(bars)} bars"
        cells = [measured(column[kind]) if kind in column else "-" for column in columns]
        lines.append(f"| {' | '.join((name, targets(bars), *cells))} |")
    return "\n".join(lines)


def kinds(files: list[Json]) -> dict[tuple[str, str], list[Json]]:
    """Group and unit -> bars."""
    found: dict[tuple[str, str], list[Json]] = {}
    for bar in (bar for one in files for bar in one["bars"]):
        found.setdefault((bar["group"], bar["target"]["unit"]), []).append(bar)
    return found


def targets(bars: list[Json]) -> str:
    aim = bars[0]["target"]
    values = between([bar["target"]["value"] for bar in bars], "{:g}".format)
    return f"{'at least' if aim['at_least'] else 'at most'} {values} {aim['unit']}"


def measured(bars: list[Json]) -> str:
    missed = sum(not bar["target"]["met"] for bar in bars)
    values = between([bar["measured"]["median"] for bar in bars], number)
    return values + (", missed" if missed == len(bars) == 1 else f", {missed} missed" if missed else "")


def between(values: list[float], written: Any) -> str:
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low} to {high}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(overview([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
