"""The paged kernels, which every card shares, read off their machine code; no card is needed."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import NamedTuple

import pytest

from .test_library import count, dump, loops, machine_code, pytestmark  # noqa: F401  the mark skips here too

STORAGES = ("as_queries", "int8", "float8_e4m3")  # in the order of csrc/common/problem.h


class Kernel(NamedTuple):
    architecture: str
    dtype: str
    stored: str
    head_dim: int
    rows: int

    @property
    def mangled(self) -> str:
        storage = f"LNS_7StorageE{STORAGES.index(self.stored)}E"
        return f"attend_kernelINS_{len(self.dtype)}{self.dtype}E{storage}Li{self.head_dim}ELi{self.rows}EE"

    @property
    def products(self) -> int:
        """Of 16 x 8 x 16, a warp's of a block of keys: with keys, and with values."""
        wide = self.head_dim == 256 and (self.rows == 64 or self.stored == "as_queries")
        keys = 16 if self.rows == 16 else 32 if wide else 64
        return 2 * keys * self.head_dim // 128


KERNELS = [
    Kernel(*x) for x in itertools.product(("sm_80", "sm_90a"), ("Bfloat16", "Float16"), STORAGES, (64, 128, 256), (16, 64))
]  # fmt: skip


@cache
def resource_usage() -> dict[str, str]:
    """By architecture and kernel."""
    used = {}
    for line in dump("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = f"{architecture} {found[1]}"
        elif "REG:" in line:
            used[name] = line
    return used


def code_of(kernel: Kernel) -> list[tuple[int, str]]:
    (name,) = [n for n in machine_code() if n.startswith(f"{kernel.architecture} ") and kernel.mangled in n]
    return machine_code()[name]


def test_every_kernel_is_there() -> None:
    assert sum("attend_kernel" in name for name in machine_code()) == len(KERNELS)
    for architecture, kernel in itertools.product(("sm_80", "sm_90a"), ("parts", "append", "copy", "merge")):
        assert any(name.startswith(architecture) and f"{kernel}_kernel" in name for name in machine_code())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_products_run_over_copies(kernel: Kernel) -> None:
    (inner,) = [loop for loop in loops(code_of(kernel)) if count(loop, r"HMMA\.16816\S*") == kernel.products]
    assert count(inner, r"LDGSTS\.E\.BYPASS\.128\.ZFILL") > 0, "no copies of what comes next"
    assert count(inner, r"BAR\.SYNC\S*") == 1 and count(inner, r"DEPBAR\.LE") == 1, "one wait and one meeting a block"
    assert count(inner, "STL") == 0
    assert count(inner, "LDL") == 0 or kernel.rows == 64


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_registers_and_stack(kernel: Kernel) -> None:
    (line,) = [
        line for name, line in resource_usage().items()
        if name.startswith(f"{kernel.architecture} ") and kernel.mangled in name
    ]  # fmt: skip
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["REG"] <= 255 and used["LOCAL"] == 0
    assert used["STACK"] <= (0 if kernel.rows == 16 else 320 if kernel.head_dim == 256 else 32)
