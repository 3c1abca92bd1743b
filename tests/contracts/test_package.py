"""What is installed, and what an import brings with it: each in a fresh interpreter in the repository's root, as `make` starts it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def in_root(script: str) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def is_ours(path: str) -> bool:
    """`path` lies in the folder kernels/ of the repository, or links to it as an editable install does."""
    return Path(path).resolve().is_relative_to(ROOT / "kernels")


def test_import_kernels_finds_the_package_of_that_name_and_not_our_folder() -> None:
    """transformers imports PyPI's `kernels`; the root has a folder of that name."""
    pytest.importorskip("kernels")
    assert (ROOT / "kernels" / "__init__.py").exists()
    found = in_root("import duplex_attn, kernels; print(kernels.__file__)")
    ours = in_root("import duplex_attn.kernels.tuning as x; print(x.__file__)")
    assert Path(ours).parts[-3:] == ("duplex_attn", "kernels", "tuning.py") and not is_ours(found)
    assert not is_ours(str(importlib.util.find_spec("kernels").origin)), "nor in this run of pytest"  # type: ignore[union-attr]
    assert importlib.metadata.packages_distributions()["kernels"] == ["kernels"]


def test_without_the_package_there_is_no_kernels() -> None:
    """Ours is not found in its stead: a finder hides everything but what the root or our install would give."""
    hide = """
import importlib.util, sys, sysconfig
sys.path = [p for p in sys.path if p not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
print(importlib.util.find_spec("kernels"))
"""
    assert in_root(hide) == "None"


def test_the_only_top_level_name_installed_is_duplex_attn() -> None:
    distribution = importlib.metadata.distribution("duplex-attn")
    assert (distribution.read_text("top_level.txt") or "").split() == ["duplex_attn"]
    top = {Path(str(file)).parts[0] for file in distribution.files or []}
    code = {name for name in top if not name.endswith((".dist-info", ".pth")) and name != ".."}
    assert code <= {"duplex_attn"}


def test_import_brings_neither_triton_nor_transformers() -> None:
    """Both take seconds to import, and neither is needed on a CPU: not by the import, not by a call."""
    script = """
import sys, torch
before = set(sys.modules)
import duplex_attn as da
def fresh(): return sorted({m.partition(".")[0] for m in set(sys.modules) - before} & {"triton", "transformers", "kernels", "numpy", "tokenizers", "safetensors"})
print(fresh())
x = torch.randn(1, 4, 2, 8, requires_grad=True)
da.attention(x, x, x, da.causal()).sum().backward()
da.backends()
print(fresh())
"""
    assert in_root(script).split("\n") == ["[]", "[]"]


def test_types_are_installed() -> None:
    package = files("duplex_attn")
    assert (package / "py.typed").is_file()
    assert (package / "kernels" / "tuning" / "sm_90.json").is_file()


def test_version_and_command() -> None:
    distribution = importlib.metadata.distribution("duplex-attn")
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and distribution.version == declared[1]
    assert (
        in_root("from duplex_attn.cli import main; main(['--version'])")
        == f"duplex-attn, version {distribution.version}"
    )
    scripts = {script.name: script.value for script in distribution.entry_points if script.group == "console_scripts"}
    assert scripts == {"duplex-attn": "duplex_attn.cli:main"}


def test_every_public_name_is_there_and_documented() -> None:
    import duplex_attn

    assert duplex_attn.__all__ == sorted(duplex_attn.__all__)
    assert all(getattr(duplex_attn, name).__doc__ for name in duplex_attn.__all__)
