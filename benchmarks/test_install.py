"""What it costs to have the package: to import it, and to build it from source."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from duplex_attn.profile.timing import Spread

from .bar import Bar, Bench, at_most

ROOT = Path(__file__).parents[1]
IMPORT = """
import time
import torch
start = time.perf_counter()
import duplex_attn
print(time.perf_counter() - start)
"""


def test_import(bench: Bench) -> None:
    """`import duplex_attn` after `import torch`, in fresh processes."""
    found: list[float] = []

    def once() -> None:
        ran = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        found.append(float(ran.stdout))

    bench.benchmark.pedantic(once, rounds=1 if bench.tiny else 7, warmup_rounds=1)
    bench.keep(Bar("install", "import, beyond import torch", at_most(0.3, "s"), Spread.of(found[1:] or found)))


@pytest.mark.timeout(1800)
def test_build(bench: Bench, tmp_path: Path) -> None:
    """A wheel from a copy of the sources that has nothing built in it."""
    if bench.tiny:
        pytest.skip("a build has no smaller size")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "out"),
    ]
    start = time.perf_counter()
    bench.benchmark.pedantic(
        subprocess.run, args=(command,), kwargs={"cwd": tmp_path / "source", "check": True, "capture_output": True}
    )
    taken = time.perf_counter() - start
    assert list((tmp_path / "out").glob("duplex_attn-*.whl"))
    bench.keep(Bar("install", "full build from source", at_most(300, "s"), Spread.of([taken])))
