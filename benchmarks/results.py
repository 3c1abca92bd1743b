"""The bars of one run, as a table and as benchmarks/results/<device>.json."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from duplex_attn.doctor import machine
from rich import box
from rich.table import Table

from .bar import OURS, Bar

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"


def as_json(bars: Sequence[Bar], device: str, part: str = "") -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "device": device,
        **({"part": part} if part else {}),
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "bars": [{**asdict(bar), "target": {**asdict(bar.target), "met": bar.met}} for bar in bars],
    }


def table(bars: Sequence[Bar], title: str) -> Table:
    """A row a bar, for a sweep its worst shape and every one that misses."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_style="bold")
    shown.add_column("bar")
    for name in ("measured", "quartiles", "target", "ours", "peer"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    for name in ("GFLOP/s", "of GEMM"):
        shown.add_column(name, justify="right", no_wrap=True)
    for group in dict.fromkeys(bar.group for bar in bars):
        members = [bar for bar in bars if bar.group == group]
        title = f"{group}: {sum(bar.met for bar in members)} of {len(members)} met"
        shown.add_row(title, style="bold")
        for bar in worth_showing(members):
            shown.add_row(f"  {bar.name}", *cells(bar), style="" if bar.met else "red")
    return shown


def worth_showing(members: list[Bar]) -> list[Bar]:
    if not members[0].sweep:
        return members
    missed = [bar for bar in members if not bar.met]
    return missed or [min(members, key=lambda bar: bar.measured.median)]


def cells(bar: Bar) -> list[str]:
    seconds = bar.seconds
    peer = min((name for name in seconds if name != OURS), key=lambda name: seconds[name].median, default=None)
    gflops = bar.gflops()
    return [
        f"{bar.measured.median:.3g}",
        f"{bar.measured.q1:.3g} to {bar.measured.q3:.3g}",
        f"{bar.target} {'met' if bar.met else 'MISSED'}",
        duration(seconds[OURS].median) if OURS in seconds else "",
        duration(seconds[peer].median) if peer else "",
        peer or "",
        "" if gflops is None else f"{gflops:,.0f}",
        "" if gflops is None or not bar.gemm else f"{gflops / bar.gemm:.0%}",
    ]


def duration(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.1f} us"
    )


def device_file(name: str) -> Path:
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def write(bars: Sequence[Bar], device: str, path: Path, part: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(bars, device, part), indent=1) + "\n")


def commit() -> str | None:
    """The commit that is checked out, with "+" where tracked files differ from it."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "")
