"""The results of a card: one JSON file, written anew after every step, so that an interruption loses one step at most.

    {"schema", "kind": "gpu", "device", "rehearsal", "machine", "stages": {name: {"status", "reason", "seconds", "commit",
     "sources", "versions", "at", and what the stage found}}}

status: "done"; "failed", something is wrong with the package; "cut" by its time limit; "skipped", with its reason.
A measured system is {"status": "measured", "seconds": {"median", "q1", "q3", "rounds"}, ...}; another one is "skipped",
"wrong", "failed" or "crashed", with its "reason".
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from .limits import LIMITS
from .settings import ROOT

SCHEMA = 1
STATUSES = ("done", "failed", "cut", "skipped")
SYSTEM_STATUSES = ("measured", "skipped", "wrong", "failed", "crashed")
UNFINISHED = "it never came to its end"
CODE = ("attn", "kernels", "csrc", "benchmarks/gpu", "tests")
CODE_SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh")
TABLES = "kernels/tuning/sm_*.json"  # of architectures; a card's own is a result


class Store:
    """One process at a time: the stages' processes follow each other, and the one that starts them waits meanwhile."""

    def __init__(self, path: Path, device: str = "", rehearsal: bool = False, checked: bool = True) -> None:
        """`checked`: a file that is no result is refused. Within a run it is not: what one stage wrote may not end the others."""
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "kind": "gpu", "device": device, "rehearsal": rehearsal, "machine": {}, "stages": {},
        }  # fmt: skip
        if path.exists():
            self.data = read(path) if checked else json.loads(path.read_text())

    def stage(self, name: str) -> dict[str, Any]:
        return self.data["stages"].setdefault(name, {})

    def begin(self, name: str) -> dict[str, Any]:
        """The stage's record: the old one where an interrupted run of the same left it, else an empty one."""
        old = self.stage(name)
        if old.get("status") != "cut" or not is_of_this(old):
            self.data["stages"][name] = {}
        stamp = {"status": "cut", "reason": UNFINISHED, "seconds": 0.0, "commit": commit()}
        self.stage(name).update(stamp | {"sources": sources(), "versions": versions(), "at": now()})
        self.save()
        return self.stage(name)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, self.data)

    def is_done(self, name: str) -> bool:
        stage = self.data["stages"].get(name, {})
        ended = ("done", "skipped") if name == "build" else ("done", "failed", "skipped")  # others need what it builds
        return stage.get("status") in ended and is_of_this(stage)


def write(path: Path, data: dict[str, Any]) -> None:
    """The file is at any time the old one or the new one."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(beside, path)


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


def is_of_this(stage: dict[str, Any]) -> bool:
    """Whether the same sources gave it, with the same torch and Triton."""
    return stage.get("sources") == sources() and stage.get("versions", versions()) == versions()


def versions() -> dict[str, str]:
    return {x: metadata.version(x) for x in ("torch", "triton") if importlib.util.find_spec(x) is not None}


def commit(root: Path = ROOT) -> str | None:
    """What is checked out, with "+" where tracked files differ; None in a copy without git, for `make report` to find."""
    try:
        head = git("rev-parse", "HEAD", root=root).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if differs(root, *CODE, ":(exclude)kernels/tuning") or differs(root, TABLES) else "")


def differs(root: Path, *paths: str) -> bool:
    """From what is checked out."""
    return subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *paths], cwd=root).returncode != 0


def sources(root: Path = ROOT) -> str:
    """A digest of what was run, code and tiles, which tells one run's results from another's with git or without."""
    files = {path.relative_to(root): path for folder in CODE for path in (root / folder).rglob("*")}
    return digest({name.as_posix(): path.read_bytes() for name, path in files.items() if is_run(name)})


def is_run(path: PurePath) -> bool:
    return path.suffix in CODE_SUFFIXES or path.match(TABLES)


def commit_with(wanted: str, root: Path = ROOT) -> str | None:
    """The newest commit up to the one checked out that has these sources."""
    for one in git("rev-list", "HEAD", "--", *CODE, root=root).decode().split():
        try:
            archive = git("archive", one, "--", *CODE, root=root)
        except subprocess.CalledProcessError:  # one of the folders was not there yet
            continue
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = [member for member in tar if member.isfile() and is_run(PurePath(member.name))]
            if digest({m.name: tar.extractfile(m).read() for m in members}) == wanted:  # type: ignore[union-attr]
                return one
    return None


def git(*arguments: str, root: Path = ROOT) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout


def digest(texts: Mapping[str, bytes]) -> str:
    found = hashlib.sha256()
    for path in sorted(texts):
        found.update(f"{path}\0".encode() + texts[path])
    return found.hexdigest()[:16]
