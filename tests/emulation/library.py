"""Builds the CUDA kernels for the CPU: the same sources, with `machine/` in the place of the hardware."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from duplex_attn.backends import CudaBackend

ROOT = Path(__file__).parents[2]
CSRC, MACHINE = ROOT / "csrc", Path(__file__).parent / "machine"
FOLDER = ROOT / "build" / "emulation"
HEAD_DIMS = (64, 96, 128, 192, 256)
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-x", "c++",
    f"-I{MACHINE}", f"-I{CSRC}", "-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
SOURCES = [
    *((CSRC / "cuda/sm90/forward.cu", [f"-DDUPLEX_HEAD_DIM={d}"]) for d in HEAD_DIMS),
    *((CSRC / "cuda" / name, []) for name in ("sm90/variants.cpp", "prepare.cu", "forward.cpp", "library.cpp")),
    *((source, []) for source in sorted(MACHINE.glob("*.cpp"))),
]


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@cache
def library() -> Path:
    """The built library; processes that want it at the same time wait for the first."""
    cxx = compiler()
    assert cxx is not None
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = [
        p for folder in (CSRC / "common", CSRC / "cuda", MACHINE) for p in sorted(folder.rglob("*")) if p.is_file()
    ]
    how = zlib.crc32(b"".join([" ".join([cxx, *FLAGS]).encode(), *(p.read_bytes() for p in texts)]))
    target = FOLDER / f"libduplex_emulated.{how:08x}.so"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in FOLDER.glob("*.so"):
                old.unlink()
            build(cxx, target)
    return target


def build(cxx: str, target: Path) -> None:
    def compile_one(n: int) -> str:
        source, flags = SOURCES[n]
        done = FOLDER / f"{n}.o"
        subprocess.run([cxx, *FLAGS, *flags, "-c", str(source), "-o", str(done)], check=True)
        return str(done)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, range(len(SOURCES))))
    links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([cxx, "-shared", *objects, "-o", f"{target}.new", *links], check=True)
    Path(f"{target}.new").rename(target)


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


FAULTS = ("nothing", "mbarrier_wait", "named_sync", "proxy_fence", "product_wait", "product_fence", "block_sync")


@contextmanager
def left_out(what: str, number: int = 0) -> Iterator[None]:
    """The machine ignores an operation of the kernels: of mbarriers and named barriers, the one with this number."""
    functions().emulation_leave_out(FAULTS.index(what), number)
    yield
    functions().emulation_leave_out(0, 0)


class EmulatedCuda(CudaBackend):
    """The backend `cuda` on CPU tensors."""

    device_type = "cpu"

    @cache  # noqa: B019  one instance lives as long as the process
    def missing(self) -> str | None:
        if compiler() is None:
            return "no C++ compiler found: the CUDA kernels are not emulated"
        self.library = library()
        return self.load()


EMULATED = EmulatedCuda()
