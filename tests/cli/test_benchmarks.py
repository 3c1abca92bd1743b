"""The machinery of `make bench` at sizes that cost nothing: a wrong output stops it, a missed bar does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TRIED = (
    "(test_forward and fp32 and full and 2048)",
    "(test_ragged and bf16)",
    "(test_call and without)",
    "(test_peak_memory and float32-full)",
)


def run(selection: str, results: Path) -> subprocess.CompletedProcess[str]:
    pytest_here = Path(sys.executable).with_name("pytest")
    trial = ["--tiny", "--benchmark-quiet", "-p", "no:cacheprovider", "--results", str(results), "-k", selection]
    return subprocess.run([pytest_here, "benchmarks", *trial], cwd=ROOT, capture_output=True, text=True)


def test_bars_are_measured_and_recorded(tmp_path: Path) -> None:
    ran = run(" or ".join(TRIED), tmp_path / "found.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["schema"] == 1
    assert found["machine"]["torch"] == torch.__version__
    assert len(found["commit"].rstrip("+")) == 40
    groups = {bar["group"] for bar in found["bars"]}
    assert groups - {"peak memory"} == {"forward", "ragged varlen", "overhead"}  # memory where the system tells it
    for bar in found["bars"]:
        target, measured = bar["target"], bar["measured"]["median"]
        reached = measured >= target["value"] if target["at_least"] else measured <= target["value"]
        assert target["met"] is reached
        if bar["flops"]:
            assert bar["roof"]["fp32_gemm_gflops"] > 0 and set(bar["seconds"]) > {"duplex-attn"}
    assert f"of {len(found['bars'])} bars met" in ran.stdout
    assert "MISSED" in ran.stdout or all(bar["target"]["met"] for bar in found["bars"])


def test_the_readme_shows_what_was_measured() -> None:
    """Its table is what benchmarks/summary.py prints of the committed results files, to the letter."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    files = [file for file in files if json.loads(file.read_text()).get("kind") != "gpu"]  # those are of cards
    assert files
    for file in files:
        found = json.loads(file.read_text())
        assert found["schema"] == 1 and not found["commit"].endswith("+"), f"{file.name}: measured with local changes"
    command = [sys.executable, str(ROOT / "benchmarks" / "summary.py"), *map(str, files)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / "README.md").read_text()
