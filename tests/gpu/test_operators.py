"""torch's own checks of the operators, with tensors on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from ..api.calls import CALLS, FORWARD, MERGE, leaf, made
from ..lanes import Lane
from .conftest import CARD, SMALL

PAIRS = [
    *((lane, name) for lane in SMALL for name in ("full", "packed")),
    *(pytest.param(lane, name, marks=pytest.mark.gpu) for lane in CARD for name in list(CALLS)[::4]),
]


def moved(x: Any, device: str) -> Any:
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def in_bulk_rows(x: torch.Tensor) -> torch.Tensor:
    """As the CUDA kernels take it."""
    half = x.detach().to(torch.bfloat16 if x.dtype == torch.float32 else x.dtype)
    return torch.nn.functional.pad(half, (0, -x.shape[-1] % 8)).requires_grad_(x.requires_grad)


@pytest.mark.parametrize(("card", "name"), PAIRS, ids=str, indirect=["card"])
def test_forward_passes_opcheck(card: Lane, name: str) -> None:
    arguments = made(name) | {"backend": card.backend}
    if card.backend == "cuda":
        arguments |= {x: in_bulk_rows(arguments[x]) for x in "qkv"}
    opcheck(FORWARD, tuple(moved(x, card.device) for x in arguments.values()))


def test_merge_passes_opcheck(card: Lane) -> None:
    outs = [moved(leaf(2, 5, 4, 16), card.device) for _ in range(3)]
    lses = [moved(leaf(2, 4, 5), card.device) for _ in range(3)]
    opcheck(MERGE, (outs, lses, card.backend))
