"""Whether a card can be used at all, and what nvidia-smi tells of it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

UUID = "12345678-9abc"
NVIDIA_SMI = f"""#!/bin/sh
[ "$3" = --id=GPU-{UUID} ] || exit 1
case $1 in
    --query-gpu=compute_mode) echo {{mode}} ;;
    --query-gpu=utilization.gpu) echo {{busy}} ;;
esac
"""


@pytest.mark.parametrize(
    ("mode", "busy", "problem", "condition"),
    [
        ("Default", "3", "", None),
        ("Default", "70", "", "the card was busy 70% of the time"),
        ("Default", "[N/A]", "", None),
        ("Exclusive_Process", "0", "the card is in compute mode Exclusive_Process, of one process at a time", None),
        ("Prohibited", "0", "the card is in compute mode Prohibited, of no process", None),
    ],
)
def test_a_card(
    mode: str, busy: str, problem: str, condition: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No context is made where it would only fail."""
    from benchmarks.gpu.card import look

    def mem_get_info(device: int) -> tuple[int, int]:
        if mode != "Default":
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return 2**36, 2**36

    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI.format(mode=mode, busy=busy))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="a card", major=9, minor=0, uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    found = look("cuda")
    assert found.name == "a card" and found.problem.startswith(problem) and bool(found.problem) == bool(problem)
    assert len(found.conditions) == (condition is not None)
    assert condition is None or found.conditions[0].startswith(condition)
