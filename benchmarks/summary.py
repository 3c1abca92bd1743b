"""Prints results files as the README shows them, a column each: one row a bar, or a sweep's worst and best. Reads the files alone.

python benchmarks/summary.py benchmarks/results/<device>.json ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(*machines: dict[str, Any]) -> str:
    found = [rows(one) for one in machines]
    lines = [
        f"| workload | bar | {' | '.join(one['device'] for one in machines)} |",
        "|---" * (2 + len(machines)) + "|",
    ]
    for key in dict.fromkeys(key for one in found for key in one):
        lines.append(f"| {' | '.join([*key, *(one.get(key, '-') for one in found)])} |")
    return "\n".join(lines)


def rows(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Workload and bar -> what was measured."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for bar in results["bars"]:
        groups.setdefault(bar["group"], []).append(bar)
    found = {}
    for group, bars in groups.items():
        if bars[0]["sweep"]:
            values = [bar["measured"]["median"] for bar in bars]
            met = sum(bar["target"]["met"] for bar in bars)
            span = f"{number(min(values))} to {number(max(values))}, {met} met"
            found[f"{group}, {len(bars)} shapes", target(bars[0])] = span
            continue
        for bar in bars:
            measured = number(bar["measured"]["median"])
            found[f"{group}: {bar['name']}", target(bar)] = measured + ("" if bar["target"]["met"] else ", missed")
    return found


def target(bar: dict[str, Any]) -> str:
    aim = bar["target"]
    return f"{'at least' if aim['at_least'] else 'at most'} {aim['value']:g} {aim['unit']}"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(table(*(json.loads(Path(path).read_text()) for path in sys.argv[1:])))
