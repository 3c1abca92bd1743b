"""What `make gpu` does with a process that died, or that a kernel keeps waiting: it goes on without what did it."""

from __future__ import annotations

import io
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
        for one in before:  # these tests may run under nohup themselves
            signal.signal(one, signal.SIG_IGN if one is number else signal.SIG_DFL)
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
    monkeypatch.setattr(winners, "in_use", lambda *given: ["forward 16 64"])
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


def test_the_build_compiles_what_will_be_sanitized() -> None:
    """Its processes are many; each call of the grid has one, and half a minute would go by before the tools could begin."""
    from benchmarks.gpu.registry import SMALL_GRID, workloads
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.small_grid import CALLS
    from benchmarks.gpu.stages.build import LONG, SMALL, to_compile

    assert tuple(CALLS) == SMALL_GRID
    wanted = to_compile(parse(["build"]))
    families = {w.name: w.family for w in workloads()}
    assert sorted(wanted) == sorted([*families, *(SMALL + name for name in CALLS)])
    first = [families[name] in LONG for name in wanted[len(CALLS) :]]
    assert first == sorted(first, reverse=True) and any(first), "what one process is at longest begins at once"


LOSES_THE_CARD = """
import json, os, sys, time
from benchmarks.gpu.parts import go_on
from benchmarks.gpu.settings import Settings, parse
Settings.command = lambda *given: [sys.executable, "-c", sys.orig_argv[2], str(given[2])]
jobs = json.load(sys.stdin)
while jobs:
    job = jobs.pop(0)
    print(json.dumps({"job": job, "process": os.getpid(), "left": float((*sys.argv, 40)[1])}), flush=True)
    if job == 3:
        go_on(parse(["--inside", "build", "--results", "found.json", "--part", "0/1"]), time.monotonic() + 30, jobs)
"""


def test_a_part_that_loses_the_card_goes_on_with_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the same process, which is stopped when time is over."""
    from benchmarks.gpu import parts
    from benchmarks.gpu.settings import Settings, parse

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(Settings, "command", lambda *given: [sys.executable, "-c", LOSES_THE_CARD])
    found, said = parts.in_parts(parse(["--device", "cpu"]), "build", tmp_path, [1, 3, 2, 4], time.monotonic() + 60)
    assert [one["job"] for one in found] == [1, 3, 2, 4], said
    assert len({one["process"] for one in found}) == 1
    assert [one["left"] for one in found[:2]] == [40, 40] and all(29 < one["left"] <= 30 for one in found[2:])


def test_a_part_of_the_build_calls_the_small_grid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import small_grid
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import build

    asked: list[str] = []

    def calls(device: str, only: str) -> list[str]:
        asked.append(only)
        if only == "paged":
            raise RuntimeError("it fails")
        return []

    monkeypatch.setattr(small_grid, "calls", calls)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([f"{build.SMALL}paged", f"{build.SMALL}merge"])))
    assert build.part(parse(["build", "--device", "cpu", "--tiny"]), time.monotonic() + 60) == 0
    assert asked == ["paged", "merge"]
    told = [json.loads(line)["workload"] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{build.SMALL}paged", f"{build.SMALL}merge"]


SPOILT = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
found = json.loads(path.read_text())
found["stages"]["bench"] |= {"workloads": {"one": {"systems": {"cuda": {"status": "fine"}}}}, "reason": "", "status": "done"}
path.write_text(json.dumps(found))
"""


def test_a_stage_that_spoils_the_file_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import run
    from benchmarks.gpu.settings import Settings, parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store

    path = tmp_path / "found.json"
    code = {"bench": SPOILT + "import time\ntime.sleep(2.5)", "tune": SPOILT.replace("bench", "tune")}
    monkeypatch.setattr(Settings, "command", lambda _, stage, *given: [sys.executable, "-c", code[stage], str(path)])
    store = Store(path)
    given = ["--device", "cpu", "--tiny", "--results", str(path)]
    for stage in code:
        run.supervise(parse([stage, *given]), store, stage)
    monkeypatch.setattr(winners, "run", lambda *given: None)
    assert run.inside(parse(["--inside", "winners", *given])) == 0
    assert list(Store(path, checked=False).data["stages"]) == ["bench", "tune", "winners"]
    with pytest.raises(ValueError, match="bench: one: cuda: status: expected one of"):
        Store(path)


@pytest.mark.parametrize("installed", [True, False])
def test_a_build_of_another_machine_is_none_here(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import run
    from benchmarks.gpu.store import Store

    store = Store(tmp_path / "found.json")
    real = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: real(name) if installed else None)
    monkeypatch.setattr(store, "is_done", lambda stage: True)
    assert run.is_done(store, "build") == installed and run.is_done(store, "test")
