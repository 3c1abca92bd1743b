"""`duplex-attn doctor`: the machine as it is, and a reason for every backend that is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import duplex_attn
import pytest
import torch
from click.testing import CliRunner
from duplex_attn.cli import main


def test_json_and_text() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    machine = found["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28
    assert len(machine["cuda_cards"]) == torch.cuda.device_count()
    assert machine["cpu"] in result.stderr
    for name, status in duplex_attn.backends().items():
        assert found["backends"][name] == {"available": status.available, "detail": status.detail}
        assert any(line.split()[:1] == [name] for line in result.stderr.splitlines())
    assert found["backends"]["reference"]["available"]


def test_a_missing_backend_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = CliRunner().invoke(main, ["doctor", "--json", "-"])
    triton = json.loads(result.stdout)["backends"]["triton"]
    assert triton["available"] is torch.cuda.is_available()
    if not triton["available"]:
        assert "CUDA card" in triton["detail"] or "not installed" in triton["detail"]
        assert "missing" in result.stderr


def test_installed_command_tells_its_version() -> None:
    command = Path(sys.executable).with_name("duplex-attn")
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == version("duplex-attn")
