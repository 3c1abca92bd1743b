"""NVIDIA's compute-sanitizer over a small grid of calls: memory, races, barriers and memory that nothing wrote."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from ..settings import ROOT, Settings
from ..store import Store

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
FOUND = 66  # its exit status when it reports something
DOES_NOT_WORK = re.compile(
    r"Device not supported|not supported on this device|Unable to find injection|Target application terminated before"
)


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    alone = calls_alone(settings, store.path, deadline)
    if alone is not None:
        record.update(status="failed", reason=f"the calls fail without a tool: {alone}")
        return
    program = sanitizer()
    if program is None or settings.device == "cpu":
        reason = "compute-sanitizer is not here" if program is None else "it has nothing to look at without a card"
        record.update(status="skipped", reason=reason)
        return
    started = {tool: start(program, tool, settings, store.path, deadline) for tool in TOOLS}
    record["tools"] = {tool: outcome(process, deadline) for tool, process in started.items()}
    bad = [tool for tool, found in record["tools"].items() if found["status"] == "failed"]
    working = [tool for tool, found in record["tools"].items() if found["status"] != "skipped"]
    if bad:
        record.update(status="failed", reason=f"{', '.join(bad)} reported something")
    elif not working:
        record.update(status="skipped", reason=record["tools"]["memcheck"]["reason"])


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).exists()), None)


def calls_alone(settings: Settings, results: Path, deadline: float) -> str | None:
    """The grid without a tool, which compiles what the tools will look at; what it says if it fails."""
    command = settings.command("sanitize", deadline - time.monotonic(), results, "grid")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return "they took longer than the stage's limit"
    return None if done.returncode == 0 else done.stderr[-600:]


def start(program: str, tool: str, settings: Settings, results: Path, deadline: float) -> subprocess.Popen[str]:
    watch = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", "--launch-timeout", "0"]
    command = [*watch, *settings.command("sanitize", deadline - time.monotonic(), results, "grid")]
    # With the caching allocator off each tensor is an allocation of its own, so that a step outside is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def outcome(process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    try:
        printed, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"status": "cut", "reason": "it took longer than the stage's limit"}
    if DOES_NOT_WORK.search(printed):
        return {"status": "skipped", "reason": f"the tool does not work here: {printed.strip()[-300:]}"}
    if process.returncode == 0:
        return {"status": "done", "reason": ""}
    return {"status": "failed", "reason": f"exit status {process.returncode}", "report": printed[-4000:]}


def part(settings: Settings, deadline: float) -> int:
    from ..small_grid import calls

    for name in calls(settings.device):
        print(name, flush=True)
    return 0
