"""The libraries are built against any torch from 2.10 on: what later headers add, or bring along by chance, is not used.

Only one torch is here to compile against; its own guard (TORCH_TARGET_VERSION) hides later functions but not later macros.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*.*") if "torch/" in path.read_text())
LATER = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # torch 2.13
# What 2.10 declares there alone, and 2.13 in further headers.
DECLARED_IN = {
    "TORCH_ERROR_CODE_CHECK": "torch/headeronly/util/shim_utils.h",
    "STD_TORCH_CHECK": "torch/headeronly/util/Exception.h",
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_names_of_torch(source: Path) -> None:
    text = source.read_text()
    for name in LATER:
        assert not re.search(rf"\b{name}\b", text), f"{name} came after torch 2.10"
    for name, header in DECLARED_IN.items():
        assert not re.search(rf"\b{name}\b", text) or f"#include <{header}>" in text, f"{name} is declared in {header}"
