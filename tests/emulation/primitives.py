"""The primitives of csrc/cuda/ptx.cuh, each alone: on the emulated machine, and on a card, whose answers are kept.

A card's answers go to build/ptx_golden/<sm>, from where `make gpu` gathers them as tests/data/ptx_golden/<sm>.npz. The
emulated machine is held to every answer that is there.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..lanes import copied
from .library import CSRC, PROBES, ROOT, Box, draw, functions, read_by

GOLDEN = ROOT / "tests" / "data" / "ptx_golden"
FOUND = ROOT / "build" / "ptx_golden"
SEEDS = (0, 4, 11, 14)  # products at once, late and mixed


def box_of(x: torch.Tensor, columns: int, rows: int) -> Box:
    """x is (batch, row, head, head_dim)."""
    order = [3, 1, 2, 0]
    return Box(x.data_ptr(), tuple(x.shape[n] for n in order), tuple(2 * x.stride(n) for n in order), columns, rows)


class Emulated:
    """The emulated machine, held to what cards have said."""

    def __init__(self, golden: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self.golden = golden

    def seeds(self) -> Iterator[int]:
        for seed in SEEDS:
            draw(seed)
            yield seed

    def call(self, name: str, *arguments: object, compared: bool = True) -> str | None:
        """Arguments are numbers, arrays, of which the last is the answer, and (tensor, columns, rows) for a box of a tensor map.
        What went wrong, if something did."""
        key = key_of(name, arguments)
        told = run(functions(), name, *arguments)
        for card, answers in self.golden.items():
            if compared and told is None and key in answers:
                assert_same(arguments[-1], answers[key], f"{name} on {card}")
        return told


class OnCard:
    """The card at hand. It chooses its own order of events; of each test, the first seed's answers are kept."""

    kept = True

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.hopper = (major, minor) == (9, 0)
        self.folder = FOUND / f"sm_{major}{minor}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.library = ctypes.CDLL(str(card_library(self.hopper)))

    def seeds(self) -> Iterator[int]:
        for seed in SEEDS:
            self.kept = seed == SEEDS[0]
            yield seed

    def call(self, name: str, *arguments: object, compared: bool = True) -> str | None:
        key = key_of(name, arguments)
        there = [moved(x) for x in arguments]
        torch.cuda.synchronize()
        told = run(self.library, name, *there)
        if told is None:
            torch.cuda.synchronize()
            answer = arguments[-1]
            assert isinstance(answer, np.ndarray) and isinstance(there[-1], torch.Tensor)
            answer.reshape(-1).view(np.uint8)[:] = there[-1].cpu().numpy()
            if compared and self.kept:
                np.save(self.folder / f"{key}.npy", answer)
        return told


def key_of(name: str, arguments: tuple[object, ...]) -> str:
    """Of a call with these arguments, the answer's room included."""
    content = 0
    for x in arguments:
        if isinstance(x, tuple):
            tensor, columns, rows = x
            x = np.concatenate([tensor.contiguous().view(torch.int16).numpy().reshape(-1), [columns, rows]])
        content = zlib.crc32(np.asarray(x).tobytes(), content)
    return f"{name}_{content:08x}"


def moved(x: object) -> object:
    """An argument where a card's kernels can reach it."""
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.reshape(-1).view(np.uint8)).cuda()
    return (copied(x[0], "cuda"), *x[1:]) if isinstance(x, tuple) else x


def run(library: ctypes.CDLL, name: str, *arguments: object) -> str | None:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    told = function(*map(passed, arguments))
    return told and told.decode()


def passed(x: object) -> object:
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, tuple):
        return ctypes.byref(box_of(*x))
    return ctypes.c_uint64(x) if isinstance(x, int) and x >= 2**31 else x


def assert_same(answer: object, card: np.ndarray, what: str) -> None:
    """Bits are moved to the same places; sums may come in another order."""
    assert isinstance(answer, np.ndarray)
    if answer.dtype == np.float32:
        np.testing.assert_allclose(answer, card.reshape(answer.shape), rtol=1e-5, atol=1e-4, err_msg=what)
    else:
        np.testing.assert_array_equal(answer, card.reshape(answer.shape), err_msg=what)


@cache
def golden(folder: Path = GOLDEN) -> dict[str, dict[str, np.ndarray]]:
    """By card: answers by their keys."""
    return {path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]  # as setup.py looks for it
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


@cache
def card_library(hopper: bool) -> Path:
    """The probes of Hopper, or of every other card; processes that want it at the same time wait for the first."""
    compiler = nvcc()
    assert compiler is not None
    sources = [PROBES / "every_card.cu", *([PROBES / "hopper.cu", CSRC / "cuda" / "tensor_map.cu"] if hopper else [])]
    card = "arch=compute_90a,code=sm_90a" if hopper else "arch=compute_80,code=[sm_80,compute_80]"
    command = [
        compiler, "-std=c++20", "-O2", "-shared", "-Xcompiler", "-fPIC", f"-gencode={card}", f"-I{CSRC}", f"-I{PROBES}",
        *map(str, sources),
    ]  # fmt: skip
    texts = sorted(frozenset().union(*(read_by(source, (CSRC, PROBES)) for source in sources)))
    how = zlib.crc32(b"".join([" ".join(command).encode(), *(p.read_bytes() for p in texts)]))
    target = FOUND / f"libprobes.{how:08x}.so"
    FOUND.mkdir(parents=True, exist_ok=True)
    with (FOUND / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            subprocess.run([*command, "-o", f"{target}.new"], check=True)
            Path(f"{target}.new").rename(target)
    return target
