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
def resource_usage(architecture: str) -> dict[str, str]:
    return dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", dump("--dump-resource-usage", "-arch", architecture)))


def code_of(kernel: Kernel) -> list[tuple[int, str]]:
    code = machine_code(kernel.architecture)
    (name,) = [name for name in code if kernel.mangled in name]
    return code[name]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_every_kernel_is_there(architecture: str) -> None:
    names = list(machine_code(architecture))
    assert 2 * sum("attend_kernel" in name for name in names) == len(KERNELS)
    for kernel in ("parts", "append", "copy", "merge"):
        assert any(f"{kernel}_kernel" in name for name in names)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_products_run_over_copies(kernel: Kernel) -> None:
    over = [loop for loop in loops(code_of(kernel)) if count(loop, r"HMMA\.16816\S*") == kernel.products]
    assert len(over) == 2, "tiles of rows, and of these, blocks of keys"
    inner = min(over, key=len)
    assert count(inner, r"LDGSTS\.E\.BYPASS\.128\.ZFILL") > 0, "no copies of what comes next"
    assert count(inner, r"BAR\.SYNC\S*") == 1 and count(inner, r"DEPBAR\.LE") == 1, "one wait and one meeting a block"
    assert count(inner, "STL") == 0 and count(inner, "LDL") == 0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_registers_and_stack(kernel: Kernel) -> None:
    (line,) = [line for name, line in resource_usage(kernel.architecture).items() if kernel.mangled in name]
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["REG"] <= 255 and used["LOCAL"] == 0
    assert used["STACK"] <= (0 if kernel.rows == 16 else {64: 32, 128: 56, 256: 336}[kernel.head_dim])


class Decode(NamedTuple):
    """Of Hopper."""

    dtype: str
    stored: str
    head_dim: int

    @property
    def mangled(self) -> str:
        storage = f"LNS_7StorageE{STORAGES.index(self.stored)}E"
        return f"decode_kernelINS_{len(self.dtype)}{self.dtype}E{storage}Li{self.head_dim}E"


DECODE = [Decode(*x) for x in itertools.product(("Bfloat16", "Float16"), STORAGES, (64, 128, 256))]


@pytest.mark.parametrize("kernel", DECODE, ids=lambda kernel: "-".join(map(str, kernel)))
def test_decoding_moves_nothing_by_its_own_instructions(kernel: Decode) -> None:
    names = {name: code for name, code in machine_code("sm_90a").items() if "decode_kernel" in name}
    assert len(names) == len(DECODE)
    (code,) = [code for name, code in names.items() if kernel.mangled in name]
    text = [line for _, line in code]
    assert count(text, "UTMALDG") and not count(text, r"LDGSTS\S*")
    products = 2 * 16 * kernel.head_dim // 128  # of 16 x 8 x 16, a warp's 16 keys
    over = [loop for loop in loops(code) if count(loop, r"HMMA\.16816\S*") == products]
    inner = min(over, key=len)
    assert not count(inner, "UTMALDG") and not count(inner, r"BAR\S*"), "warps wait for what comes, not for each other"
    assert count(inner, "STL") == 0 and count(inner, "LDL") == 0
    (line,) = [line for name, line in resource_usage("sm_90a").items() if kernel.mangled in name]
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["STACK"] == 0 and used["REG"] <= (255 if kernel.head_dim == 256 else 168), "two blocks no longer fit"
