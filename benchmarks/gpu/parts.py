"""A stage's work shared out over processes, for Triton compiles in one thread."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from .settings import ROOT, Settings

MOST = 12  # processes on one card: each holds a context of half a gigabyte on it


def in_parts(
    settings: Settings, stage: str, results: Path, jobs: list[Any], deadline: float
) -> tuple[list[dict[str, Any]], str]:
    """Every line of JSON that the processes print, each having its share of `jobs` on stdin; and what they had to say."""
    count = 1 if settings.device == "cpu" else max(1, min(MOST, len(os.sched_getaffinity(0)), len(jobs)))
    seconds = deadline - time.monotonic()
    started = [
        subprocess.Popen(
            settings.command(stage, seconds, results, f"{n}/{count}"), cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for n in range(count)
    ]  # fmt: skip
    for n, process in enumerate(started):
        assert process.stdin is not None
        process.stdin.write(json.dumps(jobs[n::count]))
        process.stdin.close()
        process.stdin = None
    found, said = [], []
    for process in started:
        try:
            printed, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, errors = process.communicate()
        found += [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        said.append(errors)
    return found, "".join(said)
