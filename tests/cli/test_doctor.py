"""`duplex-attn doctor`: the machine as it is, and a reason for every backend that is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import duplex_attn
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
    assert set(found["backends"]) == set(duplex_attn.backends())
    assert found["backends"]["reference"] is None
    assert machine["cpu"] in result.stderr and "reference" in result.stderr


def test_a_missing_backend_has_its_reason() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", "-"])
    found = json.loads(result.stdout)["backends"]
    if not torch.cuda.is_available():
        assert "CUDA" in found["triton"] or "triton is not installed" in found["triton"]
        assert "missing: " in result.stderr


def test_installed_command_tells_its_version() -> None:
    command = Path(sys.executable).with_name("duplex-attn")
    ran = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == version("duplex-attn")
