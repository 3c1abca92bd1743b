"""What the build made, read off its machine code; no card is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from duplex_attn.backends import BACKENDS

LIBRARY = BACKENDS["cuda"].library
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("Bfloat16", "Float16")
KERNELS = [(d, dtype, terms) for d in HEAD_DIMS for dtype in DTYPES for terms in (False, True)]
# With terms, these have a few numbers too many for their registers: loads and stores of local memory a block of keys.
LOCAL = {("sm90", 256, True): (1, 0), ("sm80", 128, True): (10, 4)}
# Of sm80: tiles of 16 rows that a warp has, keys a block.
AMPERE = {64: (2, 64), 96: (2, 64), 128: (2, 64), 192: (1, 64), 256: (1, 32)}


def tool(name: str) -> str | None:
    """From the toolkit, or as Triton's wheel brings it."""
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(wheel) if wheel and wheel.exists() else None)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump"),
]


def dump(option: str) -> str:
    return subprocess.run(
        [str(tool("cuobjdump")), option, str(LIBRARY)], check=True, capture_output=True, text=True
    ).stdout


Kernel = tuple[int, str, bool]


def kernel_name(generation: str, head_dim: int, dtype: str, terms: bool) -> str:
    return f"{generation}14forward_kernelINS_{len(dtype)}{dtype}ENS0_5ShapeILi{head_dim}EEELb{int(terms)}E"


@cache
def machine_code() -> dict[str, list[tuple[int, str]]]:
    """By kernel: address and instruction."""
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in dump("-sass").splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernels[found[1]] = current = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line):
            current.append((int(found[1], 16), found[2]))
    return kernels


def code_of(generation: str, kernel: Kernel) -> list[tuple[int, str]]:
    (name,) = [name for name in machine_code() if kernel_name(generation, *kernel) in name]
    return machine_code()[name]


def resources(generation: str, kernel: Kernel) -> dict[str, int]:
    used = dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", resource_usage()))
    (line,) = [line for name, line in used.items() if kernel_name(generation, *kernel) in name]
    return {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}


@cache
def resource_usage() -> str:
    return dump("--dump-resource-usage")


def count(code: list[str], instruction: str) -> int:
    return sum(re.match(rf"(@\S+ )?{instruction}\b", line) is not None for line in code)


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """What lies between a jump backwards and its target."""
    found = []
    for address, line in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) <= address:
            found.append([text for at, text in code if int(target[1], 16) <= at <= address])
    return found


def test_every_kernel_is_there_for_its_cards() -> None:
    wanted = {kernel_name(generation, *kernel) for generation in ("sm80", "sm90") for kernel in KERNELS}
    built = [name for name in machine_code() if "forward_kernel" in name]
    assert len(built) == len(wanted) and all(sum(part in name for name in built) == 1 for part in wanted)
    assert {"schedule_kernel", "outside_kernel"} <= {
        word for name in machine_code() for word in re.findall(r"[a-z]+_kernel", name)
    }
    assert set(re.findall(r"sm_\d+a?", dump("--list-elf"))) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"sm_\d+a?", dump("--list-ptx"))) == {"sm_80"}, "later cards compile Ampere's"


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_hopper_tensor_cores_and_the_copy_engine_work_side_by_side(kernel: Kernel) -> None:
    head_dim, _, terms = kernel
    code = code_of("sm90", kernel)
    text = [line for _, line in code]
    assert count(text, "HGMMA") and count(text, "UTMALDG") and count(text, "USETMAXREG") == 2
    assert not count(text, "HMMA") and not count(text, "LDSM"), "products by the path of older cards"
    block_n = {192: 96, 256: 64}.get(head_dim, 128)
    products = head_dim // 16 + block_n // 16  # of one block of keys
    inner = [loop for loop in loops(code) if count(loop, "HGMMA") == products and not count(loop, "UTMALDG")]
    assert len(inner) == (1 if terms else 2), "one loop over edge blocks, one over inside blocks where they differ"
    for loop in inner:
        expect_little_local_memory("sm90", kernel, loop)
        # The compiler waits for products where the source does, and nowhere else: they are not serialised.
        assert count(loop, r"WARPGROUP\.DEPBAR\S*") == 2


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_ampere_loads_matrices_and_copies_under_products(kernel: Kernel) -> None:
    head_dim, _, terms = kernel
    code = code_of("sm80", kernel)
    row_tiles, block_n = AMPERE[head_dim]
    # Of a block of keys: products of 16 x 8 x 16, of scores and of values; operands are loaded four matrices at a time,
    # those of queries for each 16 columns, those of keys and values once for all of a warp's rows.
    products = 2 * row_tiles * block_n * head_dim // 128
    loads = head_dim // 16 * (row_tiles + 2 * block_n // 16)
    inner = [loop for loop in loops(code) if count(loop, r"HMMA\.16816\.F32(\.BF16)?") == products]
    inner = [loop for loop in inner if count(loop, r"BAR\.SYNC\S*") == 2]  # not the loop over tiles
    assert len(inner) == (1 if terms else 2), "one loop over edge blocks, one over inside blocks where they differ"
    for loop in inner:
        assert count(loop, r"LDSM\.16\.M\S*\.4") == loads
        assert count(loop, r"LDGSTS\.E\.BYPASS\.128\.ZFILL") > 0
        assert not count(loop, r"LDG\b(?!STS)") or terms, "numbers pass through registers on their way"
        assert count(loop, r"DEPBAR\.LE") == 2, "two waits for copies"
        expect_little_local_memory("sm80", kernel, loop)


def expect_little_local_memory(generation: str, kernel: Kernel, loop: list[str]) -> None:
    head_dim, _, terms = kernel
    loads, stores = LOCAL.get((generation, head_dim, terms), (0, 0))
    assert count(loop, "LDL") <= loads
    assert count(loop, "STL") <= stores


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_registers_and_stack(kernel: Kernel) -> None:
    hopper, ampere = resources("sm90", kernel), resources("sm80", kernel)
    assert hopper["REG"] <= 168, "three warpgroups of a block no longer fit"
    # The loader's, which waits for memory anyway; for the widest all of its loop over tiles.
    assert hopper["STACK"] <= (128 if kernel[0] == 256 else 64)
    assert ampere["REG"] <= 255
    assert ampere["STACK"] <= (48 if kernel[0] == 128 and kernel[2] else 0)
    assert hopper["LOCAL"] == ampere["LOCAL"] == 0


def test_size_and_what_it_links_to() -> None:
    assert LIBRARY.stat().st_size <= 40 * 2**20
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    header = subprocess.run([readelf, "-d", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", header)
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if name.startswith(("libcuda.", "libcudart", "libtorch_python", "libpython"))]
