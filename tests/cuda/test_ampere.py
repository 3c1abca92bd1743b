"""The kernels for cards from Ampere on, read off their machine code; no card is needed."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import pytest

from .test_library import KERNELS as OF_HOPPER
from .test_library import count, dump, kernel_name, loops, machine_code, pytestmark  # noqa: F401  the mark skips here too

# By kernel and head_dim, csrc/cuda/sm80/*shape.h: tiles of 16 that a warp has of what stays, how much passes at a time.
TILES = {
    "forward": {64: (2, 64), 96: (2, 64), 128: (2, 64), 192: (1, 64), 256: (1, 32)},
    "dq": {64: (2, 32), 96: (2, 32), 128: (2, 32), 192: (1, 32), 256: (1, 16)},
    "dkdv": {64: (2, 32), 96: (1, 64), 128: (1, 32), 192: (1, 32), 256: (1, 16)},
}
DIVIDED = (192, 256)  # half of the warps have dv, half dk
# With terms, these have a few numbers too many for their registers: loads and stores of local memory a turn of the loop.
LOCAL = {
    ("forward", 128, True): (10, 4), ("forward", 128, False): (3, 1), ("dq", 128, True): (3, 0), ("dkdv", 64, True): (3, 0),
}  # fmt: skip


class Kernel(NamedTuple):
    name: str
    head_dim: int
    dtype: str
    terms: bool

    @property
    def mangled(self) -> str:
        return kernel_name(*self, "sm80")

    def loops(self) -> list[tuple[int, int]]:
        """Of each inner loop: products of 16 x 8 x 16, and loads of four matrices, a turn. Matrices of what stays are loaded for each
        16 columns, those of what passes once for all that a warp has."""
        stays, passes = TILES["dq" if self.name == "distances" else self.name][self.head_dim]
        products, columns = stays * passes * self.head_dim // 128, self.head_dim // 16
        over = {"forward": [(2, 1)], "dkdv": [(4, 2)]}.get(self.name, [(3, 2)])  # all, of what stays
        if self.name == "dkdv" and self.head_dim in DIVIDED:
            over = [(2, 1), (3, 2)]
        if self.name == "forward" and not self.terms:
            over *= 2  # over edge blocks, over inside blocks
        return sorted((n * products, columns * (m * stays + n * passes // 16)) for n, m in over)


KERNELS = [Kernel(*x) for x in OF_HOPPER if x[0] in (*TILES, "distances")]


def code_of(kernel: Kernel) -> list[tuple[int, str]]:
    (name,) = [name for name in machine_code("sm_80") if kernel.mangled in name]
    return machine_code("sm_80")[name]


@cache
def resource_usage() -> dict[str, str]:
    return dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", dump("--dump-resource-usage")))


def test_every_kernel_is_there() -> None:
    built = [name for name in machine_code("sm_80") if re.search(r"4sm80\d+\w+_kernelI", name)]
    assert len(built) == len(KERNELS) and all(sum(k.mangled in name for name in built) == 1 for k in KERNELS)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_products_run_over_copies_and_stay_in_registers(kernel: Kernel) -> None:
    code = code_of(kernel)
    waits = 2 if kernel.name == "forward" else 1
    meetings = waits + (kernel.name == "distances")  # of the block, a turn
    inner = [loop for loop in loops(code) if count(loop, "HMMA") and count(loop, r"BAR\.SYNC\S*") == meetings]
    assert (
        sorted((count(loop, r"HMMA\.16816\S*"), count(loop, r"LDSM\.16\.M\S*\.4")) for loop in inner) == kernel.loops()
    )
    loads, stores = LOCAL.get((kernel.name, kernel.head_dim, kernel.terms), (0, 0))
    for loop in inner:
        assert count(loop, r"LDGSTS\.E\.BYPASS\.128\.ZFILL") > 0, "no copies of what comes next"
        assert count(loop, r"DEPBAR\.LE") == waits, "waits for copies that no meeting follows"
        assert count(loop, "LDL") <= loads and count(loop, "STL") <= stores
        assert kernel.terms or not count(loop, "LDG"), "numbers pass through registers on their way"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_registers_and_stack(kernel: Kernel) -> None:
    (line,) = [line for name, line in resource_usage().items() if kernel.mangled in name]
    used = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
    assert used["REG"] <= 255
    crowded = kernel.head_dim == 128 or kernel.name == "dkdv"
    assert used["STACK"] <= (48 if crowded else 8 if (kernel.name, kernel.head_dim) == ("distances", 96) else 0)
    assert used["LOCAL"] == 0
