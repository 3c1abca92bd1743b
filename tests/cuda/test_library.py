"""What the build made for Hopper, read off its machine code; no card is needed."""

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
KERNELS = [(d, dtype, terms) for d in HEAD_DIMS for dtype in ("Bfloat16", "Float16") for terms in (False, True)]
# The widest with terms has one number too many for its registers.
LOCAL_LOADS = {(256, "Bfloat16", True): 1, (256, "Float16", True): 1}


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


def kernel_name(head_dim: int, dtype: str, terms: bool) -> str:
    return f"4sm9014forward_kernelINS_{len(dtype)}{dtype}ENS0_5ShapeILi{head_dim}EEELb{int(terms)}E"


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


def code_of(kernel: tuple[int, str, bool]) -> list[tuple[int, str]]:
    (name,) = [name for name in machine_code() if kernel_name(*kernel) in name]
    return machine_code()[name]


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
    assert {name for name in machine_code() if "4sm9014forward_kernel" in name} == {
        name for name in machine_code() for kernel in KERNELS if kernel_name(*kernel) in name
    }
    assert len([name for name in machine_code() if "4sm9014forward_kernel" in name]) == len(KERNELS)
    assert {"schedule_kernel", "outside_kernel"} <= {
        word for name in machine_code() for word in re.findall(r"[a-z]+_kernel", name)
    }
    assert set(re.findall(r"sm_\d+a?", dump("--list-elf"))) == {"sm_80", "sm_90a"}
    assert set(re.findall(r"sm_\d+a?", dump("--list-ptx"))) == {"sm_80"}, "later cards compile Ampere's"


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_tensor_cores_and_the_copy_engine_work_side_by_side(kernel: tuple[int, str, bool]) -> None:
    head_dim, _, terms = kernel
    code = code_of(kernel)
    text = [line for _, line in code]
    assert count(text, "HGMMA") and count(text, "UTMALDG") and count(text, "USETMAXREG") == 2
    assert not count(text, "HMMA") and not count(text, "LDSM"), "products by the path of older cards"
    block_n = {192: 96, 256: 64}.get(head_dim, 128)
    products = head_dim // 16 + block_n // 16  # of one block of keys
    inner = [loop for loop in loops(code) if count(loop, "HGMMA") == products and not count(loop, "UTMALDG")]
    assert len(inner) == (1 if terms else 2), "one loop over edge blocks, one over inside blocks where they differ"
    for loop in inner:
        assert count(loop, "LDL") <= LOCAL_LOADS.get(kernel, 0)
        assert count(loop, "STL") == 0
        # The compiler waits for products where the source does, and nowhere else: they are not serialised.
        assert count(loop, r"WARPGROUP\.DEPBAR\S*") == 2


def test_registers_and_stack() -> None:
    used = dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", dump("--dump-resource-usage")))
    for kernel in KERNELS:
        (line,) = [line for name, line in used.items() if kernel_name(*kernel) in name]
        numbers = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
        assert numbers["REG"] <= 168, "three warpgroups of a block no longer fit"
        # The loader's, which waits for memory anyway; for the widest all of its loop over tiles.
        assert numbers["STACK"] <= (128 if kernel[0] == 256 else 64)
        assert numbers["LOCAL"] == 0


def test_size_and_what_it_links_to() -> None:
    assert LIBRARY.stat().st_size <= 40 * 2**20
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    header = subprocess.run([readelf, "-d", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", header)
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if name.startswith(("libcuda.", "libcudart", "libtorch_python", "libpython"))]
