"""What `tune` searches: every kind of kernel that the tables hold, each by a workload that runs it."""

from __future__ import annotations

import io
import json
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from duplex_attn.kernels import tuning

from benchmarks.gpu.check import Check

KINDS = sorted({kind for table in tuning.tables().values() for kind, held in table.items() if isinstance(held, dict)})


def test_every_kind_of_kernel_has_a_workload() -> None:
    from benchmarks.gpu.registry import workloads
    from benchmarks.gpu.stages.tune import MEASURED_BY

    assert sorted(MEASURED_BY) == KINDS
    without = [kind for kind in KINDS if not any(map(MEASURED_BY[kind], workloads()))]
    assert without == []


def test_an_entry_is_measured_by_each_kind_of_call_that_it_serves() -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages.tune import targets

    of = {goal.name: [w.name for w in goal.workloads] for goal in targets(parse(["tune"]), "sm_90")}
    assert of["forward 16 128"] == ["forward hd128 full 2048", "forward hd128 causal 2048", "prefix-LM 1024 of 4096"]
    assert of["dkdv 16 128"] == ["backward hd128 full 4096", "backward hd128 causal 4096"]
    decode = "decode 32 x 4096, pages of 16"
    assert of["paged_decode 16 128"] == [decode, f"{decode}, fp8", f"{decode}, int8"]


def test_neighbours_are_one_step_away_and_tell_the_order_of_products() -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages.tune import further, neighbours, targets

    goals = {goal.name: goal for goal in targets(parse(["tune"]), "sm_90")}
    for name in ("forward 16 128", "dq 16 128"):
        goal = goals[name]
        current = tuning.config(goal.kernel, "sm_90", goal.bits, goal.head_dim_class)
        found = neighbours(goal, current)
        assert all(sum(x != y for x, y in zip(c, current, strict=True)) == 1 for c in found)
        assert any(c.values_behind != current.values_behind for c in found) == name.startswith("forward")
        assert not set(further(goal, current)) & {current, *found}


class PlayedProblem:
    """Whose call takes what the configuration in force says, or raises that."""

    def __init__(self, outcomes: dict[tuning.Config, float | Exception]) -> None:
        self.outcomes = outcomes

    def ours(self, backend: str) -> Callable[[], float]:
        def call() -> float:
            found = self.outcomes[tuning.config("forward", "interpreter", 16, 64)]
            if isinstance(found, Exception):
                raise found
            return found

        return call

    def check(self, answer: float) -> Check:
        return Check(0.0, 1.0, 0.0 if answer > 0 else 2.0)


class PlayedClock:
    device = torch.device("cpu")

    def warm(self) -> None:
        pass

    def rounds(self, calls: Mapping[Any, Callable[[], float]], seconds: float) -> dict[Any, list[float]]:
        return {way: [call()] * 5 for way, call in calls.items()}


@pytest.mark.parametrize(
    "case", ["faster", "slower", "wrong", "does not fit", "current does not fit", "died", "timing died"]
)
def test_a_contest(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu.stages import tune
    from benchmarks.gpu.store import Store

    current = tuning.config("forward", "interpreter", 16, 64)
    other = current._replace(block_m=64)
    does_not_fit = RuntimeError("out of resource: shared memory")
    outcomes: dict[tuning.Config, float | Exception] = {current: 1.0, other: 0.9}
    outcomes |= {
        "slower": {other: 1.1}, "wrong": {other: -1.0}, "does not fit": {other: does_not_fit},
        "current does not fit": {current: does_not_fit, other: 5.0},
    }.get(case, {})  # fmt: skip
    goal = tune.Target("forward", 16, 64, (tune.workloads()[0],))
    monkeypatch.setattr(tune, "build", lambda workload, device: PlayedProblem(outcomes))
    store = Store(tmp_path / "found.json")
    record = store.stage("tune")
    record |= {"refused": {}, "status": "cut", "reason": "played", "seconds": 0.0, "sources": "0"}
    record["crashed"] = {"died": [tune.what(goal, other)], "timing died": [tune.what(goal, tune.TIMING)]}.get(case, [])
    found = tune.contest(goal, current, [other], "interpreter", PlayedClock(), store, record)
    moved = case in ("faster", "current does not fit")
    assert (found is not None and found.way == other) == moved
    assert bool(record["refused"]) == (case in ("wrong", "does not fit", "current does not fit"))
    assert tuning.config("forward", "interpreter", 16, 64) == current and "running" not in record


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where a card is")
def test_each_workload_runs_the_kernel_that_it_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.families import build
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages.tune import targets

    asked: set[tuple[str, int]] = set()
    real = tuning.config

    def config(kernel: str, table: str, bits: int, head_dim: int) -> tuning.Config:
        asked.add((kernel, bits))
        return real(kernel, table, bits, head_dim)

    monkeypatch.setattr(tuning, "config", config)
    goals = list(targets(parse(["tune", "--device", "cpu", "--tiny"]), "interpreter"))
    assert {goal.kernel for goal in goals} == set(KINDS)
    for workload in {workload for goal in goals for workload in goal.workloads}:
        asked.clear()
        problem = build(workload, torch.device("cpu"))
        assert problem.check(problem.ours("triton")()).passes(ours=True), workload.name
        wanted = {(goal.kernel, goal.bits) for goal in goals if workload in goal.workloads}
        assert wanted <= asked, workload.name


def test_a_candidate_fits_calls_with_every_term_before_it_is_measured() -> None:
    """All are compiled together, and none in the midst of a contest."""
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages.tune import TERMS, job, targets

    goals = {goal.name: goal for goal in targets(parse(["tune"]), "sm_90")}
    for name, goal in goals.items():
        current = tuning.config(goal.kernel, "sm_90", goal.bits, goal.head_dim_class)
        *_, calls, numbers = job(goal, current)
        assert (calls[-1] == TERMS) == (goal.kernel in ("forward_terms", "dq_terms", "dkdv_terms")), name
        assert calls[: len(goal.workloads)] == [w.name for w in goal.workloads] and numbers == list(current)


def test_a_part_holds_the_tensors_of_one_call_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """There are many parts, and one card has the memory of them all."""
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import tune

    alive: weakref.WeakSet[PlayedProblem] = weakref.WeakSet()
    current = tuning.config("forward", "interpreter", 16, 64)
    emptied: list[int] = []

    def build(workload: Any, device: Any) -> PlayedProblem:
        assert not alive
        made = PlayedProblem({current: 1.0, current._replace(block_m=64): 1.0})
        alive.add(made)
        return made

    names = [w.name for w in tune.workloads()[:2]]
    jobs = [["forward", 16, 64, names, list(c)] for c in (current, current._replace(block_m=64))]
    monkeypatch.setattr(tune, "build", build)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(alive)))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(jobs)))
    given = parse(["tune", "--device", "cpu", "--tiny", "--tuning", str(tmp_path)])
    assert tune.part(given, time.monotonic() + 60) == 0
    assert [json.loads(line)["problem"] for line in capsys.readouterr().out.splitlines()] == [None, None]
    assert emptied == [0, 0]
