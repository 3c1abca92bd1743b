"""The memory that forward and backward hold at their peak, each side in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from duplex_attn.profile.timing import Spread

from .bar import OURS, Bar, Bench, at_most

TARGETS = {"float32": 1.05, "bfloat16": 1.45}  # of q, k, v, out, lse and their gradients
SHAPE = (1, 12, 8192, 64)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", TARGETS)
def test_peak_memory(bench: Bench, dtype: str, mask: str) -> None:
    shape = bench.shape(*SHAPE)
    found = {"sdpa": peak_of("sdpa", dtype, mask, shape, bench.device.type)}
    found[OURS] = bench.benchmark.pedantic(peak_of, args=(OURS, dtype, mask, shape, bench.device.type))
    if found[OURS]["peak_bytes"] is None:
        pytest.skip("this system does not tell its peak memory")
    needed = found[OURS]["needed_bytes"]
    measured = Spread.of([found[OURS]["peak_bytes"] / needed])
    target = at_most(TARGETS[dtype], "of the tensors")
    bench.keep(Bar("peak memory", f"{dtype} {mask} {SHAPE}", target, measured, facts={"sides": found}))


def peak_of(side: str, dtype: str, mask: str, shape: tuple[int, ...], device: str) -> dict[str, int]:
    script = Path(__file__).with_name("peak.py")
    command = [sys.executable, str(script), side, dtype, mask, device, *map(str, shape)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
