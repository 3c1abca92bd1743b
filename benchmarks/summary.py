"""Prints a results file as the README shows it: one row a group of bars, its worst and its best. Reads the file alone.

python benchmarks/summary.py benchmarks/results/<device>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for bar in results["bars"]:
        groups.setdefault(bar["group"], []).append(bar)
    rows = ["| workload | bar | measured | met |", "|---|---|---|---|"]
    for group, bars in groups.items():
        if bars[0]["sweep"]:
            values = [bar["measured"]["median"] for bar in bars]
            met = sum(bar["target"]["met"] for bar in bars)
            span = f"{number(min(values))} to {number(max(values))}"
            rows.append(f"| {group}, {len(bars)} shapes | {target(bars[0])} | {span} | {met} of {len(bars)} |")
            continue
        for bar in bars:
            cells = (f"{group}: {bar['name']}", target(bar), number(bar["measured"]["median"]))
            rows.append(f"| {' | '.join(cells)} | {'yes' if bar['target']['met'] else 'no'} |")
    return "\n".join(rows)


def target(bar: dict[str, Any]) -> str:
    aim = bar["target"]
    return f"{'at least' if aim['at_least'] else 'at most'} {aim['value']:g} {aim['unit']}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
