"""setup.py: what is compiled stays, and nothing that only looks compiled does."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# Writes into what it was to write, and then does as a last line says.
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo text > "$2"
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)  # where dataclasses look
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "OBJECTS", tmp_path / "objects")
    return made


def test_a_compilation_that_is_stopped_leaves_no_object(build: ModuleType, tmp_path: Path) -> None:
    """A build at its limit is killed with all that it started."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER + "kill -9 $$\n")
    compiler.chmod(0o755)
    job = build.Job(str(compiler), build.CPU / "isa.cpp", "host", ())
    with pytest.raises(subprocess.CalledProcessError):
        job.run()
    compiler.write_text(COMPILER + "echo remarks\n")
    target = job.run()
    assert target.read_text() == "text\n" and target.with_suffix(".txt").read_text() == "remarks\n"

    compiler.write_text("#!/bin/sh\nexit 1\n")
    assert job.run() == target, "it is no older than its sources"
