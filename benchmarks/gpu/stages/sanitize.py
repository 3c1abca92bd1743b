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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..limits import cuda_homes
from ..registry import SMALL_GRID
from ..settings import ROOT, Settings
from ..store import Store

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
DYING = 2.0  # seconds
FOUND = 66  # its exit status when it reports something
# Of the program alone: what else it starts uses no card, of which the tools complain. That a call of CUDA's API may fail while torch
# and Triton look for what the driver has says nothing of kernels.
# Python's stack, kept for every launch and allocation, would take time from the kernels and room from what is reported of them.
OPTIONS = ("--target-processes", "application-only", "--report-api-errors", "no", "--launch-timeout", "0")
OPTIONS += ("--show-backtrace", "device")
PORT = 49152  # the first by which a tool talks to its program
PORTS = 16  # that each has for itself: by default all that run share ten
# Of torch's own kernels only what they write matters, and that to the last of the tools alone.
NOT_TORCH = ("--kernel-name-exclude", "kns=at6native")
DOES_NOT_WORK = re.compile(
    r"Device not supported|not supported on this device|Unable to find injection|Target application terminated before"
)
REPORTED = re.compile(
    r"^=+ (Invalid|Uninitialized|Barrier error|Warpgroup MMA|(Error|Warning): (Race|Potential))", re.MULTILINE
)
DIED = re.compile(r"process didn't terminate successfully")  # and the tool ends with a status of its own
WORST = ("failed", "cut", "skipped", "done")
Found = dict[str, Any]


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    printed: IO[bytes]  # no pipe: the program outlives a tool that is stopped, and would keep it open


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    on_card = settings.device == "cuda"
    program = sanitizer() if on_card else None
    names = SMALL_GRID[::-1] if on_card else ("all",)  # what is over soon is saved soon
    found: dict[str, dict[str, Found]] = {}
    with ThreadPoolExecutor(len(names)) as threads:
        examined = threads.map(partial(examine, settings, store.path, deadline, program), names)
        for name, by_tool in zip(names, examined, strict=True):
            found[name] = by_tool
            record["alone"] = {name: by_tool["alone"] for name, by_tool in found.items()}
            if program is not None:
                record["tools"] = {tool: together(of_tool(found, tool)) for tool in TOOLS}
            store.save()
    record.update(verdict(record["alone"], record.get("tools", {})))
    if record["status"] == "done" and program is None:
        reason = "compute-sanitizer is not here" if on_card else "it has nothing to look at without a card"
        record.update(status="skipped", reason=reason)


def of_tool(found: Mapping[str, dict[str, Found]], tool: str) -> dict[str, Found]:
    """What it said of each call that it came to."""
    return {name: by_tool[tool] for name, by_tool in found.items() if tool in by_tool}


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
    """On the path, or in the toolkit whose compiler the build takes."""
    folders = [None, *(f"{home}/bin" for home in (*cuda_homes(), "/opt/cuda"))]
    return next(filter(None, (shutil.which("compute-sanitizer", path=folder) for folder in folders)), None)


def examine(settings: Settings, results: Path, deadline: float, program: str | None, name: str) -> dict[str, Found]:
    """One call of the grid: without a tool, which compiles what the build had no time for, and then with each."""
    command = settings.command("sanitize", max(deadline - time.monotonic(), 0), results, name)
    found = {"alone": outcome(start(command), deadline)}
    if program is None or not (found["alone"]["status"] == "done" or "CUDA" in found["alone"].get("report", "")):
        return found  # but of an illegal access a tool tells where it was
    ports = PORT + PORTS * len(TOOLS) * SMALL_GRID.index(name)
    started = {
        tool: start([program, *options(tool, ports + PORTS * n), *command], watched=True)
        for n, tool in enumerate(TOOLS)
    }
    return found | {tool: outcome(one, deadline) for tool, one in started.items()}


def options(tool: str, port: int) -> list[str]:
    given = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *OPTIONS]
    given += ["--port", str(port), "--max-connections", str(PORTS)]
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
        with suppress(subprocess.TimeoutExpired):  # in the midst of a call of the driver it may live on for a while
            process.wait(DYING)
    with started.printed as file:
        file.seek(0)
        printed = file.read().decode(errors="replace")
    if DOES_NOT_WORK.search(printed):
        return {"status": "skipped", "reason": f"the tool does not work here: {printed.strip()[-300:]}"}
    if in_time and process.returncode == 0:
        return {"status": "done", "reason": ""}
    if in_time and not REPORTED.search(printed) and (why := why_it_died(process.returncode, printed)):
        return {"status": "cut", "reason": why, "report": printed[-4000:]}
    if in_time:
        reason = "it reported something" if process.returncode == FOUND else f"exit status {process.returncode}"
        return {"status": "failed", "reason": reason, "report": printed[-4000:]}
    if REPORTED.search(printed):
        reason = "it reported something before its time was over"
        return {"status": "failed", "reason": reason, "report": printed[:4000]}
    return {"status": "cut", "reason": "it took longer than the stage's limit"}


def why_it_died(code: int, printed: str) -> str | None:
    """The tool, or under it the program, without a report: of too little memory, say."""
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return "the program died under it" if DIED.search(printed) else None


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
