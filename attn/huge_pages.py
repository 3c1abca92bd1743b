"""Memory of a CPU in pages of 2 MiB, where Linux gives them on request: a pool of keys and values is read once a step, so that
with pages of 4 KiB each step looks up as many addresses as the pool has pages."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a page
ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux alone


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.empty, of at least a huge page on a CPU in such pages. Memory counts as used when it is first written to."""
    size = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE or ADVICE is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return _advised(shape, dtype, size, ADVICE)


def _advised(shape: Sequence[int], dtype: torch.dtype, size: int, advice: int) -> Tensor:
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the tensor keeps it
    try:
        memory.madvise(advice)
    except OSError:  # a kernel built without them
        return torch.empty(shape, dtype=dtype)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(dtype).view(shape)
