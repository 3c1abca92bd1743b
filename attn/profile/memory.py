"""The most memory a call holds at once, above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .timing import wait

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
PAGES_AT = 64 * 1024  # bytes: from this size on malloc takes pages of its own, and gives them back when freed
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the call's peak above those held before it, or None where the system does not tell.

    On a GPU, what torch's allocator handed out. On Linux, resident pages of the whole process (VmHWM), so that scratch
    outside torch counts as well. There the allocator is first told to return freed memory at once, for good: measure
    memory after time. A call before this one should have loaded whatever is loaded once.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not (sys.platform == "linux" and return_freed_pages()):
        return None
    try:
        CLEAR_REFS.write_text("5")  # the high-water mark falls to what is resident now (proc_pid_clear_refs(5))
    except OSError:
        return None
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def meaning(device: torch.device) -> str:
    """What `peak_memory` counts, in words for a caption."""
    if device.type == "cuda":
        return "peak memory: what torch's CUDA allocator held at most during a run, above the weights and inputs"
    return "peak memory: resident pages of the process (VmHWM) at most during a run, above the weights and inputs"


def return_freed_pages() -> bool:
    """Frees what malloc keeps for reuse, and has it keep nothing large from now on. False without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, PAGES_AT)
        libc.mallopt(M_TRIM_THRESHOLD, PAGES_AT)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def resident(key: str) -> int:
    """VmRSS (bytes resident now) or VmHWM (at most so far) of this process."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
