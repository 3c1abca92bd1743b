"""compute-sanitizer, played: how it is called, and what is made of what it says, of its death and of a limit's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

SANITIZER = """#!/bin/sh
echo "========= {said}"
sleep 50 &
wait
"""


@pytest.mark.parametrize(("said", "status"), [
    ("COMPUTE-SANITIZER", "cut"), ("Invalid __global__ read of size 16 bytes", "failed"),
    ("Target application terminated before first instrumented API call", "skipped"),
])  # fmt: skip
def test_a_tool_that_is_stopped_is_not_waited_for(said: str, status: str, tmp_path: Path) -> None:
    """What it watches goes on without it, and holds its output open."""
    from benchmarks.gpu.stages.sanitize import outcome, start

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(said=said))
    tool.chmod(0o755)
    begin = time.monotonic()
    found = outcome(start([str(tool)], watched=True), begin + 1)
    assert found["status"] == status and time.monotonic() - begin < 20


def test_a_tool_that_is_killed_has_reported_nothing(tmp_path: Path) -> None:
    """As the system does where memory is short."""
    from benchmarks.gpu.stages.sanitize import outcome, start

    found = outcome(start(["sh", "-c", "kill -9 $$"], watched=True), time.monotonic() + 20)
    assert found["status"] == "cut" and found["reason"] == "its process died of SIGKILL"
    found = outcome(start(["sh", "-c", "exit 66"], watched=True), time.monotonic() + 20)
    assert found["status"] == "failed" and found["reason"] == "it reported something"


def test_the_worst_that_a_tool_said_stands_for_all_calls() -> None:
    from benchmarks.gpu.stages.sanitize import together, verdict

    done, late = {"status": "done", "reason": ""}, {"status": "cut", "reason": "late"}
    wrong = {"status": "failed", "reason": "exit status 66", "report": "Invalid read\n1 error"}
    assert together({"dense": done, "merge": done}) == done
    found = together({"dense": done, "merge": late, "paged": wrong})
    assert found["status"] == "failed" and found["reason"] == "paged: exit status 66: 1 error"
    assert found["reports"] == {"paged": "Invalid read\n1 error"}
    assert verdict({"dense": done}, {"memcheck": found})["reason"] == "memcheck: paged: exit status 66: 1 error"
    assert verdict({"dense": late}, {"memcheck": done})["status"] == "cut"
    assert verdict({"dense": done}, {"memcheck": late, "racecheck": done})["status"] == "cut", "to be gone on with"


def test_a_program_that_died_under_a_tool_has_reported_nothing() -> None:
    """The tool then ends with a status of its own; what it found before that counts."""
    from benchmarks.gpu.stages.sanitize import outcome, start

    died = "========= Error: process didn't terminate successfully"
    for said, status in ((died, "cut"), (f"========= Error: Race reported between Write access\n{died}", "failed")):
        found = outcome(start(["sh", "-c", f'echo "{said}"; exit 255'], watched=True), time.monotonic() + 20)
        assert found["status"] == status and died in found["report"]


def test_each_tool_talks_to_its_program_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By default ten ports are all that tools have together, and there are twenty at a time."""
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.small_grid import CALLS
    from benchmarks.gpu.stages import sanitize

    commands: list[list[str]] = []
    monkeypatch.setattr(sanitize, "start", lambda command, watched=False: commands.append(command))
    monkeypatch.setattr(sanitize, "outcome", lambda started, deadline: {"status": "done", "reason": ""})
    for name in CALLS:
        sanitize.examine(parse(["sanitize"]), tmp_path, time.monotonic() + 9, "compute-sanitizer", name)
    watched = [command for command in commands if command[0] == "compute-sanitizer"]
    ports = {int(command[command.index("--port") + 1]) for command in watched}
    each = {int(command[command.index("--max-connections") + 1]) for command in watched}
    assert len(ports) == len(watched) == 4 * len(CALLS) and max(ports) + sanitize.PORTS < 2**16
    assert {port % sanitize.PORTS for port in ports} == {0} and each == {sanitize.PORTS}


def test_the_sanitizer_is_found_in_the_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu.stages.sanitize import sanitizer

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")


def test_what_is_known_of_a_call_stays_when_the_stage_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import sanitize
    from benchmarks.gpu.store import Store

    wrong = {"status": "failed", "reason": "it reported something", "report": "Invalid read"}
    done = {"status": "done", "reason": ""}

    def examine(settings: Any, results: Any, deadline: Any, program: Any, name: str) -> dict[str, Any]:
        if name == "packed with all":
            raise KeyboardInterrupt
        return {"alone": done, "memcheck": wrong if name == "dense" else done}

    monkeypatch.setattr(sanitize, "examine", examine)
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    store = Store(tmp_path / "found.json")
    with pytest.raises(KeyboardInterrupt):
        sanitize.run(parse(["sanitize"]), store, store.begin("sanitize"), 0.0)
    left = Store(store.path).stage("sanitize")
    assert (
        left["status"] == "cut" and left["tools"]["memcheck"]["reason"] == "dense: it reported something: Invalid read"
    )
