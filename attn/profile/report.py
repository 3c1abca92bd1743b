"""What a profile found: the one table it prints, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .timing import Spread

SCHEMA = 1
NUMBERS = ("largest\ndifference\nto float64", "latency\nms", "spread", "tokens/s", "peak\nMiB")


@dataclass(frozen=True)
class Measurement:
    """One system on one workload. `speed[peer]` is how many times as fast as the peer it is, by round."""

    system: str
    difference: float
    seconds: Spread
    tokens_per_second: float
    peak_bytes: int | None
    speed: dict[str, Spread]


@dataclass(frozen=True)
class Comparison:
    """All systems on one workload; the last one is ours."""

    workload: str
    detail: str
    tokens: int
    measurements: list[Measurement]

    @property
    def peers(self) -> list[str]:
        return [measurement.system for measurement in self.measurements[:-1]]


@dataclass(frozen=True)
class Report:
    text: str
    dtype: str
    device: str
    rounds: int
    notes: list[str]
    machine: dict[str, Any]
    comparisons: list[Comparison]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def render(report: Report) -> RenderableType:
    """The table, a row a system; the peers that the ratios refer to head the last columns. 80 columns hold it."""
    peers = list(dict.fromkeys(peer for comparison in report.comparisons for peer in comparison.peers))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=heading(report), title_style="bold")
    table.add_column("")
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers:
        table.add_column(f"speed\nto\n{peer}", justify="right", no_wrap=True)
    for comparison in report.comparisons:
        table.add_row(comparison.workload, style="bold")
        for measurement in comparison.measurements:
            ours = measurement is comparison.measurements[-1]
            cells = [f"{measurement.difference:.1e}", *latency(measurement.seconds)]
            cells += [f"{measurement.tokens_per_second:,.0f}", mebibytes(measurement.peak_bytes)]
            cells += [ratio(measurement, peer) for peer in peers]
            table.add_row(f"  {measurement.system}", *cells, style="bold" if ours else "", end_section=ours)
    lines = [f"{comparison.workload}: {comparison.detail}" for comparison in report.comparisons] + report.notes
    return Group(table, *(Padding(Text(line, style="dim"), (0, 0, 0, 1)) for line in lines))


def heading(report: Report) -> str:
    threads = f", {report.machine['torch_threads']} threads" if report.device == "cpu" else ""
    return f"{report.text}\n{report.dtype} on {report.device}{threads}, rounds: {report.rounds}"


def latency(seconds: Spread) -> tuple[str, str]:
    """The median in ms, and half the distance between the quartiles in per cent of it."""
    ms = seconds.median * 1e3
    digits = 0 if ms >= 1000 else 1 if ms >= 10 else 3
    return f"{ms:,.{digits}f}", f"±{(seconds.q3 - seconds.q1) / 2 / seconds.median:.0%}"


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"


def ratio(measurement: Measurement, peer: str) -> str:
    if peer == measurement.system:
        return "1"
    return f"{measurement.speed[peer].median:.2f}x" if peer in measurement.speed else ""
