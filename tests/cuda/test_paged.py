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
    def products(self) -> tuple[int, ...]:
        """Of 16 x 8 x 16, a warp's of a block of keys: with keys, and with values. Where there are few rows, of 8 and of 16."""
        if self.rows == 16:
            return self.head_dim // 8, self.head_dim // 4
        return ((32 if self.head_dim == 256 else 64) * self.head_dim // 64,)


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


def over_keys(code: list[tuple[int, str]], products: int) -> list[str]:
    """The innermost loop with so many products."""
    return min((loop for loop in loops(code) if count(loop, r"HMMA\.16816\S*") == products), key=len)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_products_run_over_copies(kernel: Kernel) -> None:
    for products in kernel.products:
        inner = over_keys(code_of(kernel), products)
        assert count(inner, r"LDGSTS\.E\.BYPASS\.128\.ZFILL") > 0, "no copies of what comes next"
        assert count(inner, r"BAR\.SYNC\S*") == 1 and count(inner, r"DEPBAR\.LE") == 1, (
            "one wait and one meeting a block"
        )
        assert count(inner, "STL") == 0 and count(inner, "LDL") == 0


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_registers_and_stack(kernel: Kernel) -> None:
    (line,) = [line for name, line in resource_usage(kernel.architecture).items() if kernel.mangled in name]
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["REG"] <= 255 and used["LOCAL"] == 0
    assert used["STACK"] <= (24 if kernel.head_dim == 256 else 0)


class Decode(NamedTuple):
    """Of Hopper."""

    dtype: str
    stored: str
    head_dim: int

    @property
    def crowded(self) -> bool:
        """Three blocks a multiprocessor, which leave it a few registers short."""
        return self.head_dim == 128 and self.stored != "as_queries"

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
    for rows in (8, 16):
        inner = over_keys(code, 2 * rows * kernel.head_dim // 128)  # of 16 x 8 x 16: a warp's 16 keys
        assert not count(inner, "UTMALDG") and not count(inner, r"BAR\S*"), (
            "warps wait for what comes, not for each other"
        )
        assert count(inner, "STL") == 0 and count(inner, "LDL") == 0
        converted = count(inner, r"F2FP\.F16\.E4M3\.UNPACK_B")
        assert converted == (kernel.head_dim // 2 if kernel.stored == "float8_e4m3" else 0), (
            "a register for two numbers"
        )
    (line,) = [line for name, line in resource_usage("sm_90a").items() if kernel.mangled in name]
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["STACK"] <= (24 if kernel.crowded else 0), used
    most = 255 if kernel.head_dim == 256 else 168 if kernel.stored == "as_queries" else 128
    assert used["REG"] <= most, "blocks that share a multiprocessor no longer fit"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_rows_on_their_way(architecture: str) -> None:
    """What moves and merges rows: 16 bytes at a time where they allow it, no local memory, and as many threads as hide the wait."""
    code = machine_code(architecture)
    used = {
        name: line
        for name, line in resource_usage(architecture).items()
        if re.search("(append|copy|merge|parts)_kernel", name)
    }
    assert sum("append_kernel" in name for name in used) == 3 * 3 * 2  # by type, by what pages hold, by 16 bytes or not
    for name, line in used.items():
        numbers = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
        assert numbers["STACK"] == 0 and numbers["LOCAL"] == 0
        as_queries = re.search(r"append_kernelI\w+StorageE0E", name)
        assert numbers["REG"] <= (64 if as_queries else 128)
        if found := re.search(r"(append|merge|parts)_kernelI\w+Li([48])EE", name):
            text = [instruction for _, instruction in code[name]]
            rows = 4 if found[1] == "append" else 16  # in front of a loop and in it: a pair of runs; two of four parts
            tables = {"8": 4, "4": 2}[found[2]] if found[1] == "append" else 0  # cos and sin
            assert count(text, r"LDG\.E\.128\S*") == rows + tables and not count(text, r"LDG\.E\.U16\S*")
