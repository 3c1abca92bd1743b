"""Installs the package in place, says what the machine has, and has every kernel of the workloads compiled, in parallel."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..limits import cores
from ..parts import go_on, in_parts
from ..registry import SMALL_GRID, workloads
from ..settings import ROOT, Settings
from ..store import Store
from ..workload import Problem, Workload

if TYPE_CHECKING:
    import torch

SMALL = "small grid: "  # and the name of one of its calls, among those of workloads
LONG = {"biased", "tables"}  # families with a kernel for the forward and for each gradient
DOCTOR = """
import json, sys
from pathlib import Path
from duplex_attn.doctor import diagnose, render
diagnosis = diagnose()
Path(sys.argv[1]).write_text(json.dumps(diagnosis))
try:
    import rich
except ImportError:
    print(json.dumps(diagnosis, indent=1))
else:
    rich.print(render(diagnosis))
"""


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    if problem := install(settings, deadline):
        record.update(status="failed", reason=problem)
        return
    importlib.invalidate_caches()
    diagnosis = doctor()
    store.data["machine"] = diagnosis["machine"]
    record["backends"] = diagnosis["backends"]
    store.save()
    if settings.device == "cuda" and not store.data["machine"]["cuda_cards"]:
        return
    names = to_compile(settings)
    compiled, said = in_parts(settings, "build", store.path, names, deadline)
    record["compiled"] = {one["workload"]: one["seconds"] for one in compiled}
    record["flex"] = {one["workload"]: one["flex"] for one in compiled if "flex" in one}
    if late := [name for name in names if name not in record["compiled"]]:
        record["not_compiled"] = late  # bench compiles them, in its own time
        print(said[-2000:], file=sys.stderr)


def to_compile(settings: Settings) -> list[str]:
    """What takes longest first, for one process is at it alone; of a rehearsal next to nothing: interpreted kernels are not compiled."""
    chosen = [w for w in workloads() if settings.wants(w.name)]
    if settings.device == "cpu":
        return [w.name for w in chosen[:1]]
    return [SMALL + name for name in SMALL_GRID] + [w.name for w in sorted(chosen, key=lambda w: w.family not in LONG)]


def install(settings: Settings, deadline: float) -> str | None:
    """Offline: from the tools and the torch that are here. A rehearsal stops short of replacing what is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--config-settings", "editable_mode=strict", "--editable", str(ROOT)]
    if settings.device == "cpu":
        command.insert(4, "--dry-run")
    environment = {"MAX_JOBS": str(cores()), **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(deadline - time.monotonic(), 1)
        )
    except subprocess.TimeoutExpired:
        return "the build took longer than its limit"
    return None if done.returncode == 0 else f"pip failed: {complaint(done.stdout + done.stderr)}"


def complaint(printed: str) -> str:
    """Lines of errors: pip says last that it failed, and long before that of what."""
    lines = [line.strip() for line in printed.splitlines()]
    return "\n".join(line for line in lines if re.search(r"\berrors?\b|Error\b", line))[:1500] or printed[-600:].strip()


def doctor() -> dict[str, Any]:
    """`duplex-attn doctor` without its command line, whose packages may be missing here. In a process of its own:
    this one began before the package was there."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "doctor.json"
        subprocess.run([sys.executable, "-c", DOCTOR, str(report)], check=True)
        return json.loads(report.read_text())


def part(settings: Settings, deadline: float) -> int:
    """Calls each workload once with every backend, and what `sanitize` will look at: Triton keeps what it compiles on disk."""
    import torch

    device = torch.device(settings.device)

    def call(name: str) -> dict[str, float]:
        return call_grid(name, device) if name.startswith(SMALL) else call_workload(workload_of(name, settings), device)

    return call_all(settings, deadline, call)


def call_all(settings: Settings, deadline: float, call: Callable[[str], dict[str, float]]) -> int:
    """A part's share of names, which it is told on stdin."""
    import torch

    from .bench import works

    names = json.load(sys.stdin)
    while names and time.monotonic() < deadline:
        name = names.pop(0)
        begin = time.perf_counter()
        found = call(name)
        taken = round(time.perf_counter() - begin - found.get("flex", 0.0), 1)
        print(json.dumps({"workload": name, "seconds": taken} | found), flush=True)
        if not works(torch.device(settings.device)):
            go_on(settings, deadline, names)
        torch.cuda.empty_cache()  # for the other processes
    return 0


def workload_of(name: str, settings: Settings) -> Workload:
    (found,) = (w for w in workloads() if w.name == name)
    return found.tiny() if settings.tiny else found


def call_grid(name: str, device: torch.device) -> dict[str, float]:
    from ..small_grid import calls
    from .bench import in_short

    try:
        list(calls(device.type, name.removeprefix(SMALL)))
    except Exception as error:  # sanitize meets it again
        print(f"{name}: {in_short(error)}", file=sys.stderr)
    return {}


def call_workload(workload: Workload, device: torch.device) -> dict[str, float]:
    """Seconds of FlexAttention's first call, where it has one."""
    import torch

    from ..families import build
    from .bench import backends, in_short

    try:
        problem = build(workload, device)
    except Exception as error:  # bench meets it again, and records it
        print(f"{workload.name}: {in_short(error)}", file=sys.stderr)
        return {}
    for backend in backends(device):
        try:
            problem.ours(backend)()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # a refusal, or what bench meets again
            print(f"{workload.name}: {backend}: {in_short(error)}", file=sys.stderr)
    seconds = compile_flex(problem) if workload.flex else None
    return {} if seconds is None else {"flex": seconds}


def compile_flex(problem: Problem) -> float | None:
    """Seconds until FlexAttention's first answer; later processes find on disk what it compiled."""
    begin = time.perf_counter()
    try:
        problem.peers["flex"]().call()
    except Exception as error:  # bench records it
        print(f"flex: {error}", file=sys.stderr)
        return None
    return round(time.perf_counter() - begin, 1)
