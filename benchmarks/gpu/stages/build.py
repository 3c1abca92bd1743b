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
from pathlib import Path
from typing import Any

from ..limits import cores
from ..parts import in_parts
from ..registry import workloads
from ..settings import ROOT, Settings
from ..store import Store
from ..workload import Problem

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
    names = [w.name for w in workloads() if settings.wants(w.name)]
    if settings.device == "cpu":
        names = names[:1]  # interpreted kernels are not compiled
    compiled, said = in_parts(settings, "build", store.path, names, deadline)
    record["compiled"] = {one["workload"]: one["seconds"] for one in compiled}
    record["flex"] = {one["workload"]: one["flex"] for one in compiled if "flex" in one}
    if late := [name for name in names if name not in record["compiled"]]:
        record["not_compiled"] = late  # bench compiles them, in its own time
        print(said[-2000:], file=sys.stderr)


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
    """Calls each workload once with every backend: Triton keeps what it compiles on disk."""
    import torch

    from ..families import build
    from .bench import backends, in_short

    device = torch.device(settings.device)
    by_name = {w.name: w for w in workloads()}
    for name in json.load(sys.stdin):
        if time.monotonic() > deadline:
            break
        begin = time.perf_counter()
        workload = by_name[name].tiny() if settings.tiny else by_name[name]
        try:
            problem = build(workload, device)
        except Exception as error:  # bench meets it again, and records it
            print(f"{name}: {in_short(error)}", file=sys.stderr)
            continue
        for backend in backends(device):
            try:
                problem.ours(backend)()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # a refusal, or what bench meets again
                print(f"{name}: {backend}: {in_short(error)}", file=sys.stderr)
        found = {"workload": name, "seconds": round(time.perf_counter() - begin, 1)}
        if workload.flex and (seconds := compile_flex(problem)) is not None:
            found["flex"] = seconds
        print(json.dumps(found), flush=True)
    return 0


def compile_flex(problem: Problem) -> float | None:
    """Seconds until FlexAttention's first answer; later processes find on disk what it compiled."""
    begin = time.perf_counter()
    try:
        problem.peers["flex"]().call()
    except Exception as error:  # bench records it
        print(f"flex: {error}", file=sys.stderr)
        return None
    return round(time.perf_counter() - begin, 1)
