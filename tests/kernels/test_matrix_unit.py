"""The matrix unit of Intel's server processors (AMX): what stands in for it in tests elsewhere gives the same bits."""

from __future__ import annotations

import pytest
import torch

from ..cases import BFLOAT16, Case, grid, problem
from ..lanes import EMULATED_AMX, Lane, run, supported


@pytest.mark.parametrize("case", [case for case in grid() if case.dtype == BFLOAT16][::5], ids=str)
def test_emulated_bit_by_bit(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if "amx" not in supported():
        pytest.skip("this CPU has no matrix unit")
    made = problem(case)
    answers = []
    for isa in ("amx", EMULATED_AMX):
        monkeypatch.setenv("DUPLEX_ATTN_ISA", isa)
        answers.append(run(made.call, Lane("cpu"), made.dout, made.dlse, deterministic=True))
    for name, x in answers[0].items():
        assert torch.equal(x, answers[1][name]), name
