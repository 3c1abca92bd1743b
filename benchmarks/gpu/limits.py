"""How long each stage may take: nine minutes in all on a machine with 16 cores.

The build's time follows from what there is to compile and from the cores that compile it. What it takes beyond its minute
comes off the stages that do as much as their time allows, each of which keeps half of it at least; with few cores, and all
to be compiled, nine minutes are therefore not enough.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

# Seconds, in order. The build's are those of installing and of Triton's compiler.
LIMITS = {"build": 60, "test": 120, "bench": 150, "sanitize": 60, "tune": 90, "winners": 60}
ELASTIC = ("bench", "tune", "winners")
LEAST = 0.5  # of an elastic stage's time
MARGIN = 1.5  # of a machine that is slower than that of the seconds below, or busy


# Core-seconds of one file of csrc in all its variants: an EPYC core, g++ 12 and nvcc 13.0, by which two cores compiled all CUDA
# kernels in 210 s; rounded up.
HOST = {"cpu/kernels/*.cpp": 15, "cpu/*.cpp": 3, "runtime/*.cpp": 3}
CUDA = {"cuda/sm*/*.cu": 40, "cuda/paged/attend.cu": 100, "cuda/*.cu": 4, "cuda/**/*.cpp": 3}
LONGEST, LONGEST_CUDA = 12, 30  # seconds of one compilation, which may begin when all others end


def build_limit(csrc: Path, cores: int, nvcc: bool) -> int:
    """Seconds in which everything is compiled anew and installed."""
    host, cuda = (
        sum(each * len(list(csrc.glob(pattern))) for pattern, each in files.items())
        for files in (HOST, CUDA if nvcc else {})
    )
    longest = LONGEST_CUDA if cuda else LONGEST if host else 0
    return math.ceil(LIMITS["build"] + MARGIN * ((host + cuda) / cores + longest))


def limits_here(csrc: Path) -> dict[str, float]:
    return {**LIMITS, "build": build_limit(csrc, cores(), has_nvcc())}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def after_build(limits: Mapping[str, float], taken: float, asked: Collection[str] = ()) -> dict[str, float]:
    """Those of a run whose build took so many seconds. A limit that was asked for stays."""
    over = max(taken - LIMITS["build"], 0) / sum(LIMITS[stage] for stage in ELASTIC)
    share = max(1 - over, LEAST)
    return {
        stage: limit * share if stage in ELASTIC and stage not in asked else limit for stage, limit in limits.items()
    }


def has_nvcc() -> bool:
    """Where setup.py looks for it."""
    return any(shutil.which("nvcc", path=path) for path in (None, *(f"{home}/bin" for home in cuda_homes())))


def cuda_homes() -> list[str]:
    """Folders of CUDA's toolkit, there or not."""
    return [*filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))), "/usr/local/cuda"]
