"""NVIDIA's compute-sanitizer over a small grid of calls: memory, races, barriers and memory that nothing wrote."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..settings import ROOT, Settings
from ..store import Store

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
FOUND = 66  # its exit status when it reports something
# Of the program alone: what else it starts uses no card, of which the tools complain. That a call of CUDA's API may fail while torch
# and Triton look for what the driver has says nothing of kernels.
OPTIONS = ("--target-processes", "application-only", "--report-api-errors", "no", "--launch-timeout", "0")
# Of torch's own kernels only what they write matters, and that to the last of the tools alone.
NOT_TORCH = ("--kernel-name-exclude", "kns=at6native")
DOES_NOT_WORK = re.compile(
    r"Device not supported|not supported on this device|Unable to find injection|Target application terminated before"
)
REPORTED = re.compile(r"^=+ (Invalid|Uninitialized|Error: |Barrier error|Race)", re.MULTILINE)
WORST = ("failed", "cut", "skipped", "done")
Found = dict[str, Any]


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    printed: IO[bytes]  # no pipe: the program outlives a tool that is stopped, and would keep it open


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    from ..small_grid import CALLS

    on_card = settings.device == "cuda"
    program = sanitizer() if on_card else None
    names = list(CALLS) if on_card else ["all"]
    with ThreadPoolExecutor(len(names)) as threads:
        examined = threads.map(partial(examine, settings, store.path, deadline, program), names)
        found = dict(zip(names, examined, strict=True))
    alone = record["alone"] = {name: by_tool.pop("alone") for name, by_tool in found.items()}
    if program is not None:
        record["tools"] = {
            tool: together({name: by_tool[tool] for name, by_tool in found.items() if tool in by_tool})
            for tool in TOOLS
        }
    record.update(verdict(alone, record.get("tools", {})))
    if record["status"] == "done" and program is None:
        reason = "compute-sanitizer is not here" if on_card else "it has nothing to look at without a card"
        record.update(status="skipped", reason=reason)


def verdict(alone: Mapping[str, Found], tools: Mapping[str, Found]) -> Found:
    """Of the stage."""
    if bad := {tool: one["reason"] for tool, one in tools.items() if one["status"] == "failed"}:
        return {"status": "failed", "reason": "; ".join(f"{tool}: {reason}" for tool, reason in bad.items())[:1000]}
    without = together(alone)
    if without["status"] != "done":
        return {"status": without["status"], "reason": f"the calls without a tool: {without['reason']}"}
    if tools and all(one["status"] == "skipped" for one in tools.values()):
        return {"status": "skipped", "reason": tools["memcheck"]["reason"]}
    if late := [tool for tool, one in tools.items() if one["status"] == "cut"]:
        return {"status": "cut", "reason": f"{', '.join(late)} did not come to an end"}
    return {"status": "done", "reason": ""}


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next((place for place in PLACES if Path(place).exists()), None)


def examine(settings: Settings, results: Path, deadline: float, program: str | None, name: str) -> dict[str, Found]:
    """One call of the grid: without a tool, which compiles what the tools will look at, and then with each."""
    command = settings.command("sanitize", max(deadline - time.monotonic(), 0), results, name)
    found = {"alone": outcome(start(command), deadline)}
    if program is None or not (found["alone"]["status"] == "done" or "CUDA" in found["alone"].get("report", "")):
        return found  # but of an illegal access a tool tells where it was
    started = {tool: start([program, *options(tool), *command], watched=True) for tool in TOOLS}
    return found | {tool: outcome(one, deadline) for tool, one in started.items()}


def options(tool: str) -> list[str]:
    given = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *OPTIONS]
    return given if tool == "initcheck" else [*given, *NOT_TORCH]


def start(command: list[str], watched: bool = False) -> Started:
    # With the caching allocator off each tensor is an allocation of its own, so that a step outside is seen.
    environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if watched else {})}
    printed = tempfile.TemporaryFile()  # noqa: SIM115  outcome closes it
    return Started(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT), printed
    )


def outcome(started: Started, deadline: float) -> Found:
    """What a tool had reported counts, though it did not come to its end."""
    process, in_time = started.process, True
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        in_time = False
        process.kill()
        process.wait()
    with started.printed as file:
        file.seek(0)
        printed = file.read().decode(errors="replace")
    if DOES_NOT_WORK.search(printed):
        return {"status": "skipped", "reason": f"the tool does not work here: {printed.strip()[-300:]}"}
    if in_time and process.returncode == 0:
        return {"status": "done", "reason": ""}
    if in_time and process.returncode < 0 and not REPORTED.search(printed):  # of too little memory, say
        died = signal.Signals(-process.returncode).name
        return {"status": "cut", "reason": f"its process died of {died}", "report": printed[-4000:]}
    if in_time:
        reason = "it reported something" if process.returncode == FOUND else f"exit status {process.returncode}"
        return {"status": "failed", "reason": reason, "report": printed[-4000:]}
    if REPORTED.search(printed):
        reason = "it reported something before its time was over"
        return {"status": "failed", "reason": reason, "report": printed[:4000]}
    return {"status": "cut", "reason": "it took longer than the stage's limit"}


def together(calls: Mapping[str, Found]) -> Found:
    """What one tool said of all calls: the worst of it, and of which."""
    if not calls:
        return {"status": "skipped", "reason": "no call came to its end without it"}
    worst = min((one["status"] for one in calls.values()), key=WORST.index)
    of = {name: one for name, one in calls.items() if one["status"] == worst}
    if worst == "done":
        return {"status": "done", "reason": ""}
    first = next(iter(of.values()))
    told = first.get("report", "").strip().splitlines()[-1:]  # of Python, the exception
    reason = ", ".join(of) + ": " + ": ".join([first["reason"], *told])
    return {
        "status": worst,
        "reason": reason,
        "reports": {name: one["report"] for name, one in of.items() if "report" in one},
    }


def part(settings: Settings, deadline: float) -> int:
    from ..small_grid import calls

    for name in calls(settings.device, "" if settings.part == "all" else settings.part):
        print(name, flush=True)
    return 0
