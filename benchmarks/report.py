"""`make report`: everything that is derived from benchmarks/results, and nothing else in it.

docs/performance.md and its plots, attn/evidence.json (what the package chooses its backends by) and each card's
kernels/tuning/<card>.json. A test fails where one of them is not what the results say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import plots, summary
from .gpu import page
from .gpu.evidence import evidence
from .gpu.registry import workloads
from .gpu.settings import RESULTS, ROOT, TUNING
from .gpu.store import commit_with, is_of_a_card, read, write
from .gpu.verdict import Results, seconds, systems

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
EVIDENCE = ROOT / "attn" / "evidence.json"


@dataclass(frozen=True)
class Plot:
    path: Path
    shown: str  # a digest of its numbers
    draw: Callable[[Path], None]


def main() -> int:
    for path in name_commits(RESULTS, ROOT):
        print(path.name)
    for path, text in texts().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(path.relative_to(ROOT))
    for plot in all_plots():
        plot.draw(plot.path)
        print(plot.path.relative_to(ROOT))
    return 0


def name_commits(folder: Path, root: Path) -> Iterator[Path]:
    """In results of a copy that had no git, or of files that were committed later: the commit that has what was run."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if not is_of_a_card(found):
            continue
        unnamed = [stage for stage in found["stages"].values() if not is_a_commit(stage["commit"])]
        for stage in unnamed:
            stage["commit"] = commit_with(stage["sources"], root) or stage["commit"]
        if any(is_a_commit(stage["commit"]) for stage in unnamed):
            write(path, found)
            yield path


def is_a_commit(name: str | None) -> bool:
    return bool(name) and not str(name).endswith("+")


def files() -> tuple[dict[str, Results], dict[str, dict[str, Any]]]:
    """Results of cards, and of processors, by the names of their files."""
    found = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"), key=lambda path: path.stem)}
    cards = {path.stem: read(path) for path, one in found.items() if is_of_a_card(one)}
    return cards, {path.stem: one for path, one in found.items() if not is_of_a_card(one)}


def texts() -> dict[Path, str]:
    """Every derived file that is text, as it must be."""
    cards, _ = files()
    found = {PAGE: "\n".join(performance()).rstrip() + "\n"}
    found[EVIDENCE] = json.dumps({card["device"]: evidence(card) for card in cards.values()}, indent=1) + "\n"
    for name, card in cards.items():
        if "tuning" in card:
            found[TUNING / f"{name}.json"] = json.dumps(card["tuning"], indent=2) + "\n"
    return found


def performance() -> Iterator[str]:
    cards, processors = files()
    drawn = {plot.path.stem: f"performance/{plot.path.name}" for plot in all_plots()}
    yield "# Performance"
    yield ""
    yield "Made by `make report` from [benchmarks/results](../benchmarks/results); a test fails where they disagree."
    yield ""
    yield "## Cards"
    yield ""
    if not cards:
        yield from page.without_cards()
    for name, card in cards.items():
        yield from page.of_card(card, drawn.get(name))
    yield ""
    yield "## Processors"
    for name, one in processors.items():
        yield ""
        yield f"### {one['device']}" + (f", {one['part']}" if "part" in one else "")
        yield ""
        yield f"Commit {one['commit'][:12]}, {one['measured_at']}, torch {one['machine']['torch']}."
        yield ""
        if name in drawn:
            yield f"![{one['device']}]({drawn[name]})"
            yield ""
        yield summary.table(one)


def all_plots() -> Iterator[Plot]:
    cards, processors = files()
    for name, card in cards.items():
        if rows := card_rows(card):
            yield Plot(PLOTS / f"{name}.svg", plots.digest(rows), partial(plots.draw_card, card["device"], rows))
    for name, one in processors.items():
        if plots.cpu_rows(one):
            yield Plot(PLOTS / f"{name}.svg", plots.digest(plots.cpu_rows(one)), partial(plots.draw_cpu, one))


def card_rows(card: Results) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """Workloads that have a bar, each with its systems from the fastest on."""
    rows = []
    for workload in workloads():
        found = systems(card, workload.name)
        measured = [(name, t, bool(found[name].get("ours"))) for name in found if (t := seconds(found, name))]
        if workload.bars and measured:
            rows.append((workload.name, sorted(measured, key=lambda one: one[1])))
    return rows
