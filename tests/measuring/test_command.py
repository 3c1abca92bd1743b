"""`make gpu` rehearsed: all stages over the whole registry in little, and what it does when things go wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import COMMAND, ROOT, Run


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


# What a machine with a card may lack: torch, Triton and pytest it has.
LACKING = (
    "click",
    "hypothesis",
    "matplotlib",
    "pytest_benchmark",
    "pytest_timeout",
    "rich",
    "safetensors",
    "tokenizers",
)


@pytest.fixture
def lacking(tmp_path: Path) -> dict[str, str]:
    """The environment in which those packages are not found."""
    for name in LACKING:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(f'there is no {__name__}', name=__name__)")
    return {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_every_test_of_a_card_is_found_without_what_it_may_lack(lacking: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, env=os.environ | lacking, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


@pytest.mark.slow
def test_every_stage_over_every_workload(rehearse: Run, tmp_path: Path, lacking: dict[str, str]) -> None:
    from benchmarks.gpu.limits import LIMITS
    from benchmarks.gpu.registry import workloads
    from benchmarks.gpu.store import wrong_with

    ran = rehearse("--tests", "test_streams and cpu", **lacking)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = found_in(tmp_path)
    assert list(wrong_with(found)) == []
    assert found["rehearsal"] and list(found["stages"]) == list(LIMITS)
    stages = found["stages"]
    assert stages["build"]["status"] == stages["test"]["status"] == stages["bench"]["status"] == "done"
    assert found["machine"]["torch"] == torch.__version__ and stages["build"]["compiled"]
    assert stages["test"]["passed"] == 1 and stages["test"]["failures"] == []
    assert stages["sanitize"]["status"] == "skipped" and stages["sanitize"]["reason"]
    assert stages["tune"]["status"] == "done" and stages["tune"]["tried"] == 2
    assert set(stages["bench"]["workloads"]) == {w.name for w in workloads()}
    assert min(stages["bench"]["ceilings"].values()) > 0
    measured = 0
    for name, workload in stages["bench"]["workloads"].items():
        systems = workload["systems"]
        if "all" in systems:
            assert systems["all"]["reason"].startswith("in little it is "), name
            continue
        ours = [one for one in systems.values() if one.get("ours")]
        assert any(one["status"] == "measured" for one in ours), name
        for system, one in systems.items():
            assert one["status"] in ("measured", "skipped"), f"{name}: {system}: {one}"
            if one["status"] == "measured" and "difference" in one and one.get("ours"):
                assert one["difference"] <= one["allowed"]
        measured += 1
    assert measured > 12


ONE = "^decode 1 x"


def test_a_run_that_was_cut_goes_on_where_it_was(rehearse: Run, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    assert rehearse("bench", "--only", ONE).returncode == 0
    found = found_in(tmp_path)
    bench = found["stages"]["bench"]
    (kept,) = bench["workloads"].values()
    bench.update(status="cut", reason="interrupted")
    path.write_text(json.dumps(found))
    assert rehearse("bench", "--only", f"{ONE}|^append 4096").returncode == 0
    again = found_in(tmp_path)["stages"]["bench"]
    assert again["status"] == "done" and len(again["workloads"]) == 2
    assert kept in again["workloads"].values(), "what was measured was not measured again"
    assert rehearse("bench", "--only", "^append 4096").returncode == 0
    assert len(found_in(tmp_path)["stages"]["bench"]["workloads"]) == 1, "a stage that was done begins anew"


def test_time_that_is_over_is_told(rehearse: Run, tmp_path: Path) -> None:
    ran = rehearse("bench", "--only", f"{ONE}|^append 4096", "--limit", "bench=0")
    bench = found_in(tmp_path)["stages"]["bench"]
    assert ran.returncode == 1
    assert (bench["status"], bench["reason"]) == ("cut", "time was over before 2 of 2 workloads")


PEERS = {
    "flash_attn.py": "import os\n\ndef flash_attn_func(*given, **options):\n    os.abort()\n",
    "flash_attn_interface.py": "def flash_attn_func(q, *given, **options):\n    return q * 0\n",
}


def test_a_peer_that_crashes_and_one_that_is_wrong(rehearse: Run, tmp_path: Path) -> None:
    """The stage goes on in a new process; neither peer is timed, all others are."""
    for name, text in PEERS.items():
        (tmp_path / name).write_text(text)
    ran = rehearse("bench", "--only", "^forward hd64 full 512", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    bench = found_in(tmp_path)["stages"]["bench"]
    (workload,) = bench["workloads"].values()
    systems = workload["systems"]
    assert systems["flash-attn 2"]["status"] == "crashed" and "SIGABRT in forward hd64" in bench["crashes"][0]
    assert systems["flash-attn 3"]["status"] == "wrong" and "from float64" in systems["flash-attn 3"]["reason"]
    assert {systems[name]["status"] for name in ("cpu", "triton", "sdpa math")} == {"measured"}
    assert bench["status"] == "done" and len(bench["crashes"]) == 1


@pytest.mark.slow
def test_a_peer_that_never_ends_is_stopped_at_the_limit(rehearse: Run, tmp_path: Path) -> None:
    hangs = "import time\n\ndef flash_attn_func(*given, **options):\n    time.sleep(1000)\n"
    (tmp_path / "flash_attn.py").write_text(hangs)
    ran = rehearse("bench", "--only", "^forward hd64 full 512", "--limit", "bench=25", PYTHONPATH=str(tmp_path))
    bench = found_in(tmp_path)["stages"]["bench"]
    assert ran.returncode == 1 and bench["status"] == "cut" and bench["seconds"] < 60
    assert bench["reason"] == "stopped at its limit of 25 s in forward hd64 full 512, batch 32: flash-attn 2"


def test_a_wrong_backend_of_ours_fails_the_stage(rehearse: Run, tmp_path: Path) -> None:
    spoilt = "import torch\nimport duplex_attn\nreal = duplex_attn.attention\n"
    spoilt += "duplex_attn.attention = lambda *given, **options: real(*given, **options) + 1\n"
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nif '--inside' in sys.argv:\n    exec({spoilt!r})\n")
    ran = rehearse("bench", "--only", "^forward hd64 full 512", PYTHONPATH=str(tmp_path))
    bench = found_in(tmp_path)["stages"]["bench"]
    (workload,) = bench["workloads"].values()
    assert workload["systems"]["cpu"]["status"] == "wrong", workload["systems"]["cpu"]
    assert ran.returncode == 1 and bench["status"] == "failed" and "from float64" in bench["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_without_a_card_every_stage_says_so(gpu: Run, tmp_path: Path) -> None:
    ran = gpu("test", "bench", "tune", "--results", tmp_path / "found.json")
    assert ran.returncode == 2
    for stage in found_in(tmp_path)["stages"].values():
        assert stage["status"] == "skipped" and stage["reason"].startswith("there is no CUDA card")
    assert "there is no CUDA card" in ran.stdout


def test_a_build_that_fails_says_of_what() -> None:
    from benchmarks.gpu.stages.build import complaint

    printed = "  building\n  kernel.cpp:31:3: error: 'CHECK' was not declared\n" + "  at a line of setuptools\n" * 99
    told = complaint(printed + "ERROR: Failed building editable for duplex-attn\n")
    assert told.splitlines()[0] == "kernel.cpp:31:3: error: 'CHECK' was not declared" and len(told) < 1500
    assert complaint("no word of it") == "no word of it"


@pytest.mark.parametrize(("arguments", "told"), [
    (["speed"], "STAGE: expected some of build, test, bench, sanitize, tune, winners, got 'speed'"),
    (["--limit", "bench=fast"], "--limit: expected STAGE=SECONDS"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
])  # fmt: skip
def test_bad_arguments(gpu: Run, arguments: list[str], told: str) -> None:
    ran = gpu(*arguments)
    assert ran.returncode == 2 and told in ran.stderr


def test_a_file_that_is_no_result_is_left_alone(rehearse: Run, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text('{"schema": 0}')
    ran = rehearse("bench")
    assert ran.returncode == 2 and "found.json: expected kind gpu and schema 1, got None and 0" in ran.stderr
    assert (tmp_path / "found.json").read_text() == '{"schema": 0}'


RECORDED = """
import pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_elsewhere(): pytest.skip("not here")
"""
ENDLESS = """
import time

def test_right(): pass
def test_wrong(): assert 1 == 2
def test_endless():
    while True:
        time.sleep(1)
def test_right_too(): pass
"""
FATAL = """
import os

def test_right(): pass
def test_fatal(): os._exit(1)
def test_right_too(): pass
"""
RECORDER = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("main", sys.argv[1] + "/__main__.py")
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
main.import_benchmarks()
from pathlib import Path
import pytest
from benchmarks.gpu.stages import test as stage
from benchmarks.gpu.store import Store
stage.STUCK = 4
store = Store(Path(sys.argv[2]) / "kept.json")
record = store.stage("test")
recorder = stage.Recorder(store, record, time.monotonic() + float(sys.argv[3]))
pytest.main([sys.argv[2], "-q", "-p", "no:cacheprovider", *sys.argv[4:]], plugins=[recorder])
print(json.dumps(record | {"total": recorder.total, "finished": recorder.finished}))
"""


def recorded(folder: Path, tests: str, seconds: int, *options: str) -> dict[str, Any]:
    """Of these tests in a pytest of their own."""
    (folder / "test_few.py").write_text(tests)
    command = [sys.executable, "-c", RECORDER, str(COMMAND), str(folder), str(seconds), *options]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    record: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return record


def test_what_tests_do_is_recorded(tmp_path: Path) -> None:
    record = recorded(tmp_path, RECORDED, 60)
    assert record["passed"] == 1 and record["skips"] == {"not here": 1}
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_few.py::test_wrong") and "1 == 2" in failure["message"]


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["here", "in a worker"])
def test_time_is_over_in_the_midst_of_a_test_too(tmp_path: Path, workers: list[str]) -> None:
    begin = time.monotonic()
    record = recorded(tmp_path, ENDLESS, 8, *workers)
    assert time.monotonic() - begin < 30
    assert (record["total"], record["finished"], record["passed"]) == (4, 2, 1) and "running" not in record
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_few.py::test_wrong") and "1 == 2" in failure["message"]


def test_a_test_that_ended_its_worker_has_ended_too(tmp_path: Path) -> None:
    record = recorded(tmp_path, FATAL, 60, "-n", "1")
    assert (record["total"], record["finished"], record["passed"]) == (3, 3, 2)
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_few.py::test_fatal") and "crashed" in failure["message"]


@pytest.mark.skipif(importlib.util.find_spec("pytest_timeout") is None, reason="pytest-timeout is not here")
def test_a_test_that_takes_too_long_is_no_failure(tmp_path: Path) -> None:
    record = recorded(tmp_path, ENDLESS, 60, "-n", "1", "--timeout=4", "--timeout-method=thread")
    assert (record["total"], record["finished"], record["passed"]) == (4, 4, 2)
    assert [one["test"].partition("::")[2] for one in record["late"]] == ["test_endless"]
    assert [one["test"].partition("::")[2] for one in record["failures"]] == ["test_wrong"]


@pytest.mark.parametrize("also_failed", [False, True])
def test_a_stage_with_tests_that_took_too_long_is_to_be_run_again(
    also_failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu.evidence import failing
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import test as stage
    from benchmarks.gpu.store import Store

    def play(arguments: list[str], plugins: list[Any]) -> int:
        (recorder,) = plugins
        recorder.total = recorder.finished = 3
        recorder.record["late"].append({"test": "tests/gpu/test_x.py::test_y[triton-cuda]"})
        if also_failed:
            recorder.record["failures"].append({"test": "tests/gpu/test_x.py::test_y[cuda-cuda]", "message": "wrong"})
        return 0

    monkeypatch.setattr(stage.pytest, "main", play)
    store = Store(tmp_path / "found.json")
    record = store.begin("test")
    stage.run(parse(["test", "--device", "cpu"]), store, record, time.monotonic() + 60)
    told = (
        "1 tests failed, first" if also_failed else "1 tests did not end within 60 s, first tests/gpu/test_x.py::test_y"
    )
    assert record["reason"].startswith(told) and record["status"] == ("failed" if also_failed else "cut")
    assert failing(store.data) == (["cuda"] if also_failed else [])


def test_pytest_collects_where_its_plugins_are_missing(tmp_path: Path) -> None:
    """On a machine that has pytest alone: no hypothesis, no pytest-timeout, no xdist."""
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not installed')")
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu or not gpu", "--collect-only", "-q"]
    command += ["-p", "no:timeout", "-p", "no:xdist", "-p", "no:benchmark", "-p", "no:hypothesispytest"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers"]
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert "test_random.py" not in ran.stdout and "tests/gpu/test_graphs.py" in ran.stdout
