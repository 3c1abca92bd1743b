"""`make bench`: options, the fixture that benchmarks measure with, and the table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from duplex_attn.doctor import machine
from rich.console import Console

from . import results
from .bar import Bar, Bench

BARS = pytest.StashKey[list[Bar]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("duplex-attn")
    group.addoption("--device", default="cpu", help="where to measure: cpu, cuda or cuda:N")
    group.addoption(
        "--tiny", action="store_true", help="shapes that cost nothing: tries the machinery, measures nothing"
    )
    group.addoption("--results", type=Path, help="the file to write; by default benchmarks/results/<device>.json")
    group.addoption("--part", default="", help="what of it this is, in a file of its own: <device>-<part>.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BARS] = []


@pytest.fixture
def bench(benchmark, request: pytest.FixtureRequest) -> Bench:
    config = request.config
    device = torch.device(config.getoption("--device"))
    return Bench(benchmark, device, config.getoption("--tiny"), config.stash[BARS])


def device_name(config: pytest.Config) -> str:
    if torch.device(config.getoption("--device")).type == "cuda":
        return torch.cuda.get_device_name(config.getoption("--device"))
    facts = machine()
    return f"{facts['cpu']} {facts['cores']} cores"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bars = config.stash[BARS]
    if not bars:
        return
    name, part = device_name(config), config.getoption("--part")
    path = config.getoption("--results")
    if path is None and not config.getoption("--tiny"):
        path = results.device_file(f"{name} {part}")
    if path is not None:
        results.write(bars, name, path, part)
    roof = ", ".join(f"{key} {value:,.0f}" for key, value in bars[-1].roof.items())
    terminal = Console(width=None if terminalreporter.isatty else 150, highlight=False)
    terminal.print(results.table(bars, f"{name}, torch {torch.__version__}"))
    kept = "kept nowhere: --tiny measures nothing" if path is None else f"written to {path}"
    terminal.print(f"{roof}\n{sum(bar.met for bar in bars)} of {len(bars)} bars met; {kept}", style="dim")
