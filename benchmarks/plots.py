"""Plots of results as SVG. Each carries a digest of the numbers it shows, by which a test knows that it is not old."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .bar import OURS

HEIGHT = 0.24  # inches of a bar
OURS_COLOUR, PEER_COLOUR = "#2b6cb0", "#b0b7c3"


def digest(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def cpu_rows(results: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Of bars that are ratios of speed: name, ratio, and what it must reach; of a sweep the worst."""
    found: dict[str, tuple[str, float, float]] = {}
    for bar in results["bars"]:
        if bar["target"]["unit"] != "x" or OURS not in bar["seconds"]:
            continue
        name = bar["group"] if bar["sweep"] else f"{bar['group']}: {bar['name']}"
        row = (name, round(bar["measured"]["median"], 3), bar["target"]["value"])
        if name not in found or row[1] < found[name][1]:
            found[name] = row
    return list(found.values())


def draw_cpu(results: dict[str, Any], path: Path) -> None:
    """How many times as fast as the fastest peer, with a mark at what each must reach."""
    rows = cpu_rows(results)
    axes = figure(len(rows), f"{results['device']}: times as fast as the fastest peer")
    places = range(len(rows), 0, -1)
    axes.barh(places, [row[1] for row in rows], color=OURS_COLOUR)
    axes.plot([row[2] for row in rows], list(places), "|", color="black", markersize=9, label="to be reached")
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_yticks(list(places), [row[0] for row in rows], fontsize=7)
    axes.legend(loc="lower right", fontsize=7)
    save(axes, path, digest(rows))


def draw_card(device: str, rows: list[tuple[str, list[tuple[str, float, bool]]]], path: Path) -> None:
    """A group of bars a workload: each system's speed relative to the fastest."""
    axes = figure(sum(len(systems) + 1 for _, systems in rows), f"{device}: speed over the fastest system's")
    place, ticks = 0, []
    for workload, systems in rows:
        fastest = min(seconds for _, seconds, _ in systems)
        ticks.append((place + 0.8, workload))
        for name, seconds, ours in systems:
            place -= 1
            axes.barh(place, fastest / seconds, color=OURS_COLOUR if ours else PEER_COLOUR)
            axes.text(0.01, place, name, va="center", fontsize=6)
        place -= 1.4
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=7)
    save(axes, path, digest(rows))


def figure(bars: int, title: str) -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "duplex-attn", "svg.fonttype": "none"}
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(9, 1 + HEIGHT * bars))
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(y=0.01)
    return axes


def save(axes: Any, path: Path, shown: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": "make report", "Description": f"numbers {shown}"}
    axes.figure.savefig(path, bbox_inches="tight", metadata=metadata)
    from matplotlib import pyplot

    pyplot.close(axes.figure)
