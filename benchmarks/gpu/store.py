"""The results of a card: one JSON file, written anew after every step, so that an interruption loses one step at most.

    {"schema", "kind": "gpu", "device", "rehearsal", "machine", "stages": {name: {"status", "reason", "seconds", "commit",
     "sources", "at", and what the stage found}}}

status: "done"; "failed", something is wrong with the package; "cut" by its time limit; "skipped", with its reason.
A measured system is {"status": "measured", "seconds": {"median", "q1", "q3", "rounds"}, ...}; another one is "skipped",
"wrong", "failed" or "crashed", with its "reason".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .limits import LIMITS
from .settings import ROOT

SCHEMA = 1
STATUSES = ("done", "failed", "cut", "skipped")
SYSTEM_STATUSES = ("measured", "skipped", "wrong", "failed", "crashed")
UNFINISHED = "it never came to its end"
CODE = ("attn", "kernels", "csrc", "benchmarks/gpu", "tests")


class Store:
    """One process at a time: the stages' processes follow each other, and the one that starts them waits meanwhile."""

    def __init__(self, path: Path, device: str = "", rehearsal: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "kind": "gpu", "device": device, "rehearsal": rehearsal, "machine": {}, "stages": {},
        }  # fmt: skip
        if path.exists():
            self.data = read(path)

    def stage(self, name: str) -> dict[str, Any]:
        return self.data["stages"].setdefault(name, {})

    def begin(self, name: str) -> dict[str, Any]:
        """The stage's record: the old one where an interrupted run of the same sources left it, else an empty one."""
        old = self.stage(name)
        if old.get("status") != "cut" or old.get("sources") != sources():
            self.data["stages"][name] = {}
        stamp = {"status": "cut", "reason": UNFINISHED, "seconds": 0.0, "commit": commit()}
        self.stage(name).update(stamp | {"sources": sources(), "at": now()})
        self.save()
        return self.stage(name)

    def save(self) -> None:
        """The file is at any time the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)

    def is_done(self, name: str) -> bool:
        stage = self.data["stages"].get(name, {})
        return stage.get("status") in ("done", "failed", "skipped") and stage.get("sources") == sources()


def read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    problems = list(wrong_with(data))
    if problems:
        raise ValueError(f"{path.name}: {problems[0]}")
    return data


def is_of_a_card(data: dict[str, Any]) -> bool:
    return data.get("kind") == "gpu"


def wrong_with(data: dict[str, Any]) -> Iterator[str]:
    """What keeps it from being a results file of this schema."""
    if data.get("kind") != "gpu" or data.get("schema") != SCHEMA:
        yield f"expected kind gpu and schema {SCHEMA}, got {data.get('kind')} and {data.get('schema')}"
        return
    for key, kind in (("device", str), ("rehearsal", bool), ("machine", dict), ("stages", dict)):
        if not isinstance(data.get(key), kind):
            yield f"{key}: expected {kind.__name__}, got {data.get(key)!r}"
            return
    for name, stage in data["stages"].items():
        if name not in LIMITS:
            yield f"stages: expected some of {', '.join(LIMITS)}, got {name}"
        if stage.get("status") not in STATUSES:
            yield f"{name}: status: expected one of {', '.join(STATUSES)}, got {stage.get('status')}"
        if stage.get("status") != "done" and not stage.get("reason"):
            yield f"{name}: {stage.get('status')} without a reason"
        if not isinstance(stage.get("seconds"), (int, float)) or not stage.get("sources"):
            yield f"{name}: expected seconds and sources"
        for workload, found in stage.get("workloads", {}).items():
            for system, record in found["systems"].items():
                if problem := wrong_with_system(record):
                    yield f"{name}: {workload}: {system}: {problem}"


def wrong_with_system(record: dict[str, Any]) -> str | None:
    if record.get("status") not in SYSTEM_STATUSES:
        return f"status: expected one of {', '.join(SYSTEM_STATUSES)}, got {record.get('status')}"
    if record["status"] != "measured":
        return None if record.get("reason") else f"{record['status']} without a reason"
    seconds = record.get("seconds", {})
    if not all(isinstance(seconds.get(key), (int, float)) for key in ("median", "q1", "q3", "rounds")):
        return "measured without a median, quartiles and rounds"
    return None if 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"] else "quartiles out of order"


def slug(device: str) -> str:
    """A device's name as files have it, here and in kernels/tuning."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """What is checked out, with "+" where tracked files differ; DUPLEX_ATTN_COMMIT where the copy has no git."""
    if named := os.environ.get("DUPLEX_ATTN_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE, ":(exclude)kernels/tuning"], cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def sources() -> str:
    """A digest of the code that was run, which tells one run's results from another's with git or without."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
