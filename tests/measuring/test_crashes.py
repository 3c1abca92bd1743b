"""What `make gpu` does with a process that died, or that a kernel keeps waiting: it goes on without what did it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ROOT

ONE = "forward hd64 full 512, batch 32"
STAMP = {"status": "cut", "reason": "it never came to its end"}


@pytest.mark.slow
def test_what_is_stuck_is_passed_over_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import run
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.store import Store

    (tmp_path / "flash_attn.py").write_text(
        "import time\n\ndef flash_attn_func(*given, **options):\n    time.sleep(1000)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "STUCK", 15.0)
    path = tmp_path / "found.json"
    given = ["bench", "--device", "cpu", "--tiny", "--results", path, "--only", f"^{ONE}"]
    run.supervise(parse(list(map(str, given))), Store(path), "bench")
    bench = json.loads(path.read_text())["stages"]["bench"]
    assert bench["status"] == "done" and bench["crashes"] == [f"{ONE}: flash-attn 2 took more than 15 s"]
    systems = bench["workloads"][ONE]["systems"]
    assert (systems["flash-attn 2"]["status"], systems["flash-attn 2"]["reason"]) == ("crashed", bench["crashes"][0])
    assert systems["cpu"]["status"] == systems["sdpa math"]["status"] == "measured"
    assert not {"running", "since", "said"} & set(bench)


def test_what_broke_the_card_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.run import why_it_died
    from benchmarks.gpu.stages import bench
    from benchmarks.gpu.store import Store

    def refuse(*given: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    def leave() -> None:
        raise SystemExit

    store = Store(tmp_path / "found.json")
    record = store.stage("bench")
    record |= STAMP | {"seconds": 0.0, "sources": "0"}
    monkeypatch.setattr(torch, "ones", refuse)
    monkeypatch.setattr(bench.os, "abort", leave)
    with pytest.raises(SystemExit), bench.watch(store, record, f"{ONE}: cuda"):
        try:
            refuse()
        except RuntimeError as error:
            bench.abort_unless_it_works(torch.device("cpu"), error)
    left = Store(store.path).stage("bench")
    told = f"its process died of SIGABRT in {ONE}: cuda: CUDA error: an illegal memory access was encountered"
    assert why_it_died(left, -6) == told
    left.update(crashed=[f"{ONE}: cuda"], crashes=[told])
    assert list(bench.crashes(left)) == [(ONE, "cuda", told)]


def test_a_backend_that_ends_process_after_process_is_passed_over_everywhere() -> None:
    from benchmarks.gpu.stages.bench import PATIENCE, without_hope

    def record(*crashes: str) -> dict[str, Any]:
        crashed = [
            why.removeprefix("its process died of SIGABRT in ").removesuffix(" took more than 30 s") for why in crashes
        ]
        return {"crashed": crashed, "crashes": list(crashes)}

    stuck = [f"{n}: cuda took more than 30 s" for n in range(2)]
    died = [f"its process died of SIGABRT in {n}: triton" for n in range(PATIENCE)]
    assert without_hope(record(*stuck, *died)) == {"cuda", "triton"}
    assert without_hope(record(*stuck[1:], *died[1:])) == set()


def test_stages_compile_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sets Triton's cache where nothing else has, for all kernels that its process compiles from then on."""
    from benchmarks.gpu.run import environment
    from benchmarks.gpu.settings import parse

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "/somewhere")
    assert environment(parse([]))["TRITON_CACHE_DIR"] == "/somewhere/.triton/cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert environment(parse([]))["TRITON_CACHE_DIR"] == "/elsewhere"


PART = """
import json, sys, time
for job in json.load(sys.stdin):
    print(json.dumps({"job": job}), flush=True)
    print("x" * 100_000, file=sys.stderr)
    if job == 3:
        time.sleep(50)
"""


def test_a_part_that_waits_for_ever_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu import parts
    from benchmarks.gpu.settings import Settings, parse

    monkeypatch.setattr(Settings, "command", lambda *given: [sys.executable, "-c", PART])
    monkeypatch.setattr(parts, "QUIET", 3.0)
    monkeypatch.setattr(parts, "MOST", 2)
    monkeypatch.setattr(parts.os, "sched_getaffinity", lambda pid: {0, 1})
    begin = time.monotonic()
    found, said = parts.in_parts(parse([]), "build", tmp_path, [1, 2, 3, 4, 5, 6], begin + 40)
    assert time.monotonic() - begin < 30
    assert sorted(one["job"] for one in found) == [1, 2, 3, 4, 6], "what came after it in its share is lost"
    assert len(said) > 500_000


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


STAGE = """
import pathlib, time
pathlib.Path({path!r}).touch()
time.sleep(60)
"""


def test_what_ends_the_command_ends_its_stage(tmp_path: Path) -> None:
    """A batch system's SIGTERM: else the stage would go on using the card, and write into the next run's results."""
    begun, script = tmp_path / "begun", tmp_path / "command.py"
    script.write_text(
        "import sys\nfrom benchmarks.gpu import run\nfrom benchmarks.gpu.settings import Settings\n"
        f"Settings.command = lambda *given: [sys.executable, '-c', {STAGE.format(path=str(begun))!r}]\n"
        f"run.main(['bench', '--device', 'cpu', '--tiny', '--results', {str(tmp_path / 'found.json')!r}])\n"
    )
    command = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.1)
    (child,) = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.terminate()
    assert command.wait(20) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    """As by nohup."""
    from benchmarks.gpu.run import leave_no_stage_behind

    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(number, signal.SIG_IGN)
        leave_no_stage_behind()
        kept = [one for one in before if signal.getsignal(one) is signal.SIG_IGN]
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert kept == [number]


def test_a_card_that_is_short_of_memory_leaves_results_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import run
    from benchmarks.gpu.card import Card
    from benchmarks.gpu.store import Store

    store = Store(tmp_path / "found.json", "a card", rehearsal=True)
    bench = store.begin("bench")
    bench.update(status="done", reason="", workloads={})
    store.save()
    monkeypatch.setattr(run, "look", lambda device: Card("a card", "short of memory"))
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    assert run.main(["bench", "tune", "--device", "cpu", "--tiny", "--results", str(store.path)]) == 2
    stages = Store(store.path).data["stages"]
    assert stages["bench"] == bench and stages["tune"]["reason"] == "short of memory"


def test_winners_of_another_table_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store

    store = Store(tmp_path / "found.json")
    store.data["stages"]["tune"] = {"winners": {"forward 16 64": {}}}
    record = {"table": {"of": "before"}, "workloads": {ONE: {"systems": {}, "complete": True}}}
    monkeypatch.setattr(winners, "measure_all", lambda *given: None)
    given = parse(["winners", "--device", "cpu", "--tiny", "--tuning", str(tmp_path)])
    winners.run(given, store, record, 0.0)
    assert record["workloads"] == {}
    record["workloads"] = {ONE: {"systems": {}, "complete": True}}
    winners.run(given, store, record, 0.0)
    assert ONE in record["workloads"], "an interrupted run is gone on with"


def test_winners_without_a_search_leave_a_good_file(tmp_path: Path) -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store

    store = Store(tmp_path / "found.json")
    record = store.begin("winners")
    winners.run(parse(["winners", "--device", "cpu"]), store, record, 0.0)
    store.save()
    assert Store(store.path).stage("winners")["reason"] == "tune found nothing faster"


@pytest.mark.parametrize("changed", ["nothing", "sources", "versions"])
def test_only_an_interrupted_run_of_the_same_is_gone_on_with(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other sources, or with another Triton, its times stand beside none of today."""
    from benchmarks.gpu import store

    results = store.Store(tmp_path / "found.json")
    results.begin("bench")["workloads"] = {ONE: {"systems": {}}}
    results.stage("tune").update(results.stage("bench"), status="done", reason="")
    results.save()
    if changed != "nothing":
        monkeypatch.setattr(store, changed, lambda: {"sources": "others", "versions": {"triton": "4.0"}}[changed])
    again = store.Store(results.path)
    assert again.is_done("tune") == (changed == "nothing")
    assert ("workloads" in again.begin("bench")) == (changed == "nothing")
