"""What the build made, and its kernels for Hopper, read off their machine code; no card is needed."""

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
Kernel = tuple[str, int, str, bool]  # name, head_dim, dtype, with terms
SHAPES = {
    "forward": "Shape", "paged": "Shape", "dq": "QueryShape", "distances": "QueryShape", "dkdv": "KeyShape", "fused": "FusedShape"
}  # fmt: skip
KERNELS: list[Kernel] = [
    (name, d, dtype, terms)
    for name in SHAPES
    for d in (HEAD_DIMS[:3] if name == "fused" else HEAD_DIMS)
    for dtype in ("Bfloat16", "Float16")
    for terms in (False, True)
    if terms or name != "distances"  # dq with the gradient of distance_bias
]
FORWARD = [kernel for kernel in KERNELS if kernel[0] in ("forward", "paged")]
BACKWARD = [kernel for kernel in KERNELS if kernel[0] in ("dq", "distances", "dkdv")]
FUSED = [kernel for kernel in KERNELS if kernel[0] == "fused"]
# These have a few numbers too many for their registers: name, head_dim, with terms.
SPILLED = {
    ("paged", 192, True): 1, ("paged", 256, True): 3, ("dq", 128, True): 5, ("dq", 256, True): 5,
    ("distances", 96, True): 1, ("distances", 128, True): 6, ("distances", 256, True): 1, ("fused", 128, False): 1,
}  # fmt: skip
LOCAL_LOADS = {
    (name, d, dtype, terms): n for (name, d, terms), n in SPILLED.items() for dtype in ("Bfloat16", "Float16")
}


def tool(name: str) -> str | None:
    """From the toolkit, or as Triton's wheel brings it."""
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(wheel) if wheel and wheel.exists() else None)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump"),
]


def dump(*options: str) -> str:
    return subprocess.run(
        [str(tool("cuobjdump")), *options, str(LIBRARY)], check=True, capture_output=True, text=True
    ).stdout


def kernel_name(name: str, head_dim: int, dtype: str, terms: bool, folder: str = "sm90") -> str:
    function, shape = f"{'dq' if name == 'distances' else name}_kernel", SHAPES[name]
    flags = [terms, name == "distances"] if shape == "QueryShape" else [terms]
    of = f"INS_{len(dtype)}{dtype}ENS0_{len(shape)}{shape}ILi{head_dim}EEE" + "".join(f"Lb{int(x)}E" for x in flags)
    return f"4{folder}{len(function)}{function}{of}"


@cache
def machine_code(arch: str = "sm_90a") -> dict[str, list[tuple[int, str]]]:
    """By kernel: address and instruction."""
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in dump("-sass", "-arch", arch).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernels[found[1]] = current = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line):
            current.append((int(found[1], 16), found[2]))
    return kernels


def code_of(kernel: Kernel) -> list[tuple[int, str]]:
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
    large = [name for name in machine_code() if re.search(r"4sm90\d+\w+_kernelI\w+ShapeILi\d+EEELb", name)]
    assert len(large) == len(KERNELS)
    assert all(any(kernel_name(*kernel) in name for name in large) for kernel in KERNELS)
    small = {
        "schedule_kernel",
        "outside_kernel",
        "row_sums_kernel",
        "sink_kernel",
        "distance_kernel",
        "finish_dq_kernel",
    }
    assert small <= {word for name in machine_code() for word in re.findall(r"\d([a-z_]+_kernel)", name)}
    assert set(re.findall(r"sm_\d+", dump("--list-elf"))) == {
        "sm_80",
        "sm_90",
    }  # the "a" of sm_90a not every release tells
    assert set(re.findall(r"sm_\d+a?", dump("--list-ptx"))) == {"sm_80"}, "later cards compile Ampere's"


def loops_of(kernel: Kernel, products: int) -> list[list[str]]:
    """Those with so many products and no copies: what tensor cores and copy engine do goes on side by side."""
    code = code_of(kernel)
    text = [line for _, line in code]
    assert count(text, "HGMMA") and count(text, "UTMALDG") and count(text, "USETMAXREG") == 2
    assert not count(text, "HMMA") and not count(text, "LDSM"), "products by the path of older cards"
    return [loop for loop in loops(code) if count(loop, "HGMMA") == products and not count(loop, "UTMALDG")]


def assert_local(kernel: Kernel, loop: list[str]) -> None:
    assert count(loop, "LDL") <= LOCAL_LOADS.get(kernel, 0)
    assert count(loop, "STL") <= (kernel[:2] == ("distances", 128))


@pytest.mark.parametrize("kernel", FORWARD, ids=str)
def test_forward(kernel: Kernel) -> None:
    _, head_dim, _, terms = kernel
    block_n = {192: 96, 256: 64}.get(head_dim, 128)
    inner = loops_of(kernel, head_dim // 16 + block_n // 16)
    assert len(inner) == (1 if terms else 2), "one loop over edge blocks, one over inside blocks where they differ"
    for loop in inner:
        assert_local(kernel, loop)
        # The compiler waits for products where the source does, and nowhere else: they are not serialised.
        assert count(loop, r"WARPGROUP\.DEPBAR\S*") == 2
        if head_dim == 64:
            assert_exponentials_take_turns(loop, block_n)


def assert_exponentials_take_turns(loop: list[str], block_n: int) -> None:
    """A thread's, of two rows of a block, lie between a barrier and the arrival at the next warpgroup's, each of 256 threads."""
    begin = max(n for n, line in enumerate(loop) if re.search(r"BAR\.SYNC\S* R\d+, 0x100", line))
    end = min(n for n, line in enumerate(loop) if n > begin and re.search(r"BAR\.ARV \S+ 0x100", line))
    assert count(loop[begin:end], r"MUFU\.EX2") >= block_n // 2
    assert count(loop[end:], r"MUFU\.EX2") == 0


@pytest.mark.parametrize("kernel", BACKWARD, ids=str)
def test_backward(kernel: Kernel) -> None:
    name, head_dim, _, terms = kernel
    deep, wide = head_dim // 16, (128 if head_dim <= 128 and name != "dkdv" else 64) // 16
    if name != "dkdv":
        roles = [(2 * deep + wide, 2 if terms else 3)]  # products, waits
    elif head_dim <= 128:
        roles = [(2 * deep + 2 * wide, 2 if terms else 3)]
    else:  # dv, dk
        roles = [(deep + wide, 2), (2 * deep + wide, 2 if terms else 3)]
    for products, waits in roles:
        loop = min(loops_of(kernel, products), key=len)  # there are loops around it
        assert_local(kernel, loop)
        assert count(loop, r"WARPGROUP\.DEPBAR\S*") == waits
        shuffles = {8: 34, 4: 20}[wide] if name == "distances" else 0  # of half, a quarter, an eighth of what is folded
        assert count(loop, r"SHFL\S*") == shuffles


@pytest.mark.parametrize("kernel", FUSED, ids=str)
def test_all_gradients_at_once(kernel: Kernel) -> None:
    """Five products a step, in each loop over rows; bulk reductions of dq by threads that wait for them beside it."""
    _, head_dim, _, terms = kernel
    wide = 64 // 16
    inner = loops_of(kernel, 2 * head_dim // 16 + 2 * wide + 128 // 16)
    inner = [loop for loop in inner if not any(count(loop, name) for name in ("UBLKRED", "STL"))]
    inner = [loop for loop in inner if count(loop, "LDL") <= LOCAL_LOADS.get(kernel, 0)]
    roles = 2 if head_dim == 96 else 1  # its panels of columns are not divided evenly
    assert len(inner) >= roles
    for loop in inner[:roles]:
        assert count(loop, r"WARPGROUP\.DEPBAR\S*") == (3 if terms else 4)
        assert count(loop, r"STSM\.16\S*") == 4, "dS of 64 rows to shared memory"
    assert count([line for _, line in code_of(kernel)], r"UBLKRED\S*") > 0


def stack(name: str, head_dim: int, dtype: str, terms: bool) -> int:
    if name == "forward":
        return 128 if head_dim == 256 else 64
    if name == "paged":
        return 152 if head_dim == 256 else 80
    if name == "fused":
        return {64: 32, 96: 144}.get(head_dim, 160)
    return {128: 160, 192: 240, 256: 480}.get(head_dim, 80) if name == "dkdv" else 80


def test_registers_and_stack() -> None:
    used = dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", dump("--dump-resource-usage")))
    for kernel in KERNELS:
        (line,) = [line for name, line in used.items() if kernel_name(*kernel) in name]
        numbers = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
        assert numbers["REG"] <= 168, "three warpgroups of a block no longer fit"
        # The loader's, which waits for memory anyway, and what lies outside the loops over blocks.
        assert numbers["STACK"] <= stack(*kernel)
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


def test_launches_made_ahead_wait_for_the_one_before() -> None:
    """Before they read or write memory; but for what merges parts, which reads lengths and plan meanwhile."""
    waits = {
        name: [line for _, line in code]
        for name, code in machine_code().items()
        if re.search(r"4sm90\d+(forward|dq|dkdv|fused|finish_dq)_kernel|parts_kernel", name)
    }
    assert waits
    for name, code in waits.items():
        assert count(code, "ACQBULK") == 1, name
        before = code[: next(n for n, line in enumerate(code) if "ACQBULK" in line)]
        assert "parts" in name or not any(re.search(r"\b(LDG|STG|RED|ATOMG|UTMALDG)\b", line) for line in before), name
    for kernel in ("schedule", "4sm9012fused", "4sm9013decode", "4sm9012paged", "attend"):
        codes = [code for name, code in machine_code().items() if f"{kernel}_kernel" in name]
        assert codes and all(any("PREEXIT" in line for _, line in code) for code in codes), kernel
