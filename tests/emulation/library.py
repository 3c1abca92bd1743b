"""Builds the CUDA kernels for the CPU: the same sources, with `machine/` in the place of the hardware."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from duplex_attn.backends import CudaBackend

ROOT = Path(__file__).parents[2]
CSRC, MACHINE, PROBES = ROOT / "csrc", Path(__file__).parent / "machine", Path(__file__).parent / "probes"
FOLDER = ROOT / "build" / "emulation"
HEAD_DIMS = (64, 96, 128, 192, 256)
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-x", "c++",
    f"-I{MACHINE}", f"-I{CSRC}", f"-I{PROBES}", "-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
CUDA = CSRC / "cuda"
HARDWARE = {CUDA / "device.cpp", CUDA / "tensor_map.cu"}  # what the machine takes the place of
PER_HEAD_DIM = [
    *((s, d) for s in sorted(CUDA.glob("sm*/*.cu")) if s.name not in ("fused.cu", "decode.cu") for d in HEAD_DIMS),
    *((CUDA / "sm90/fused.cu", d) for d in (64, 96, 128)),
    *((s, d) for s in (CUDA / "paged/attend.cu", CUDA / "sm90/decode.cu") for d in (64, 128, 256)),
]
SOURCES: list[tuple[Path, list[str]]] = [
    *((source, [f"-DDUPLEX_HEAD_DIM={d}"]) for source, d in PER_HEAD_DIM),
    *((s, []) for s in sorted({*CUDA.rglob("*.cu"), *CUDA.rglob("*.cpp")} - HARDWARE - {s for s, _ in PER_HEAD_DIM})),
    *((source, []) for source in sorted([*MACHINE.glob("*.cpp"), *PROBES.glob("*.cu")])),
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@cache
def library() -> Path:
    """The built library; processes that want it at the same time wait for the first."""
    cxx = compiler()
    assert cxx is not None
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: compile_one(cxx, *job), SOURCES))
        target = FOLDER / f"libduplex_emulated.{zlib.crc32(' '.join(map(str, objects)).encode()):08x}.so"
        if not target.exists():
            links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
            subprocess.run([cxx, "-shared", *map(str, objects), "-o", f"{target}.new", *links], check=True)
            Path(f"{target}.new").rename(target)
        for old in {*FOLDER.glob("*.o"), *FOLDER.glob("*.so")} - {*objects, target}:
            old.unlink()
    return target


@cache
def read_by(source: Path, folders: tuple[Path, ...] = (MACHINE, CSRC, PROBES)) -> frozenset[Path]:
    """The file and what it includes of headers in these folders, and what they do."""
    names = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    included = (folder / name for name in names for folder in folders)
    return frozenset({source}).union(*(read_by(path, folders) for path in included if path.exists()))


def compile_one(cxx: str, source: Path, flags: list[str]) -> Path:
    """Named by what goes into it."""
    texts = sorted(read_by(source))
    how = zlib.crc32(b"".join([" ".join([cxx, *FLAGS, *flags]).encode(), *(p.read_bytes() for p in texts)]))
    done = FOLDER / f"{source.parent.name}.{source.stem}.{how:08x}.o"
    if not done.exists():
        subprocess.run([cxx, *FLAGS, *flags, "-c", str(source), "-o", f"{done}.new"], check=True)
        Path(f"{done}.new").rename(done)
    return done


@cache
def functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(library()))


class Box(ctypes.Structure):
    """csrc/cuda/box.h"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        ("columns", ctypes.c_int),
        ("rows", ctypes.c_int),
    ]


def draw(seed: int, processors: int = 2) -> None:
    """What the next launches are free to choose: the order of threads, when copies land, when products read."""
    functions().emulation_set(ctypes.c_uint64(seed), ctypes.c_int(processors))


def launched() -> list[str]:
    """The kernels since the last time that this was asked."""
    function = functions().emulation_launched
    function.restype = ctypes.c_char_p
    return function().decode().split()


FAULTS = (
    "nothing", "mbarrier_wait", "named_sync", "proxy_fence", "product_wait", "product_fence", "block_sync", "warp_sync",
    "copy_wait", "reduce_wait",
)  # fmt: skip


TICKETS = ("ticket_full_0", "ticket_empty_0", "ticket_full_1", "ticket_empty_1")  # behind a kernel's own mbarriers


def mbarriers(names: list[str]) -> list[tuple[int, str]]:
    """Of a kernel of Hopper's that hands out tiles, by number: its own, and that which tells that the first ticket is there. That
    the second is there shows where a block has more tiles, that there is room for one where sequences are short: tiles of others
    are taken when the last has been begun (test_faults.py)."""
    return list(enumerate([*names, TICKETS[0]]))


@contextmanager
def left_out(what: str, number: int = 0, ranks: bool = False) -> Iterator[None]:
    """The machine ignores an operation of the kernel that ranks entries, or of all others (what ranks wrongly makes those read
    anywhere); where it numbers operations (block.h) the one with this number."""
    functions().emulation_leave_out(FAULTS.index(what), number, ranks)
    try:
        yield
    finally:
        functions().emulation_leave_out(0, 0, False)


CARDS = {"sm80": 80, "sm90": 90}  # folders of kernels, and a compute capability that takes them
EMULATED_ONLY = pytest.mark.parametrize("kernels", list(CARDS), indirect=True)


class EmulatedCuda(CudaBackend):
    """The backend `cuda` on CPU tensors, on a card of the given compute capability."""

    device_type = "cpu"
    card = 90

    @cache  # noqa: B019  one instance lives as long as the process
    def missing(self) -> str | None:
        if compiler() is None:
            return "no C++ compiler found: the CUDA kernels are not emulated"
        self.library = library()
        return self.load()

    def capability(self, device: torch.device) -> tuple[int, int]:
        return divmod(self.card, 10)

    @contextmanager
    def on(self, card: int) -> Iterator[None]:
        before, self.card = self.card, card
        functions().emulation_card(card)
        yield
        self.card = before
        functions().emulation_card(before)


EMULATED = EmulatedCuda()
