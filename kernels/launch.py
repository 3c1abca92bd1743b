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
    """(batch, head, row, dim) of x, packed without batch, for bulk copies of (rows, padded head_dim).

    None where the strides or the address of x do not allow them.
    """
    if TensorDescriptor is None or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return None
    unit = 16 // x.element_size()
    order = [*range(x.dim() - 3), -2, -3]
    strides = [x.stride(n) if x.shape[n] > 1 else unit for n in order]
    if any(stride <= 0 or stride % unit for stride in strides):
        return None
    shape = [x.shape[n] for n in (*order, -1)]
    return TensorDescriptor(x, shape, [*strides, 1], [*[1] * (x.dim() - 2), rows, tuning.padded(x.shape[-1])])
