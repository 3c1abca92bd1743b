"""What `tune` searches: every kind of kernel that the tables hold, each by a workload that runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from duplex_attn.kernels import tuning

KINDS = sorted({kind for table in tuning.tables().values() for kind, held in table.items() if isinstance(held, dict)})


def test_every_kind_of_kernel_has_a_workload() -> None:
    from benchmarks.gpu.registry import workloads
    from benchmarks.gpu.stages.tune import MEASURED_BY

    assert sorted(MEASURED_BY) == KINDS
    without = [kind for kind in KINDS if not any(map(MEASURED_BY[kind], workloads()))]
    assert without == []


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
    for workload in {goal.workload for goal in goals}:
        asked.clear()
        problem = build(workload, torch.device("cpu"))
        assert problem.check(problem.ours("triton")()).passes(ours=True), workload.name
        wanted = {(goal.kernel, goal.bits) for goal in goals if goal.workload == workload}
        assert wanted <= asked, workload.name
