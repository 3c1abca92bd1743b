"""`benchmarks`, imported as its command imports it: by its path, with no folder of the project on sys.path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "gpu"

spec = importlib.util.spec_from_file_location("benchmarks_gpu_main", COMMAND / "__main__.py")
assert spec is not None and spec.loader is not None
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
main.import_benchmarks()

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_gpu(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make gpu` with these arguments, as a user has it."""
    command = [sys.executable, str(COMMAND), *map(str, arguments)]
    given = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")} | environment
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)


@pytest.fixture(scope="session")
def gpu() -> Run:
    return run_gpu


@pytest.fixture
def rehearse(tmp_path: Path) -> Run:
    """The command on the CPU in little, with a results file and a folder of tables of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        aside = ("--device", "cpu", "--tiny", "--results", tmp_path / "found.json", "--tuning", tmp_path / "tuning")
        return run_gpu(*arguments, *aside, **environment)

    return run
