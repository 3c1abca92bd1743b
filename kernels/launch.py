"""A launch as plain data: printable, compiled ahead of time by the tests, run by calling it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


def run(device: torch.device, *launches: Launch) -> None:
    """In order, on the device's current stream."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if launch.programs == 0:
                continue
            launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants, **launch.options)


def options(tile: tuning.Config) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def descriptor(x: Tensor, rows: int) -> Any:
    """x as (batch, head, row, dim) for bulk copies of (rows, padded head_dim); None where its strides or address do not allow them."""
    if TensorDescriptor is None or x.numel() == 0 or x.data_ptr() % 16:
        return None
    x = x[None] if x.dim() == 3 else x
    batch, length, heads, head_dim = x.shape
    unit = 16 // x.element_size()
    strides = [x.stride(n) if x.shape[n] > 1 else unit for n in (0, 2, 1)]
    if x.stride(3) != 1 or any(stride <= 0 or stride % unit for stride in strides):
        return None
    return TensorDescriptor(x, [batch, heads, length, head_dim], [*strides, 1], [1, 1, rows, tuning.padded(head_dim)])
