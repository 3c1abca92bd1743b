"""Rotary positions: the angles of each position, and queries and keys turned by them (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch to longer contexts: "linear" (arXiv 2306.15595) or "llama3" (Llama 3.1's)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Rotary:
    """One kind of rotary positions."""

    head_dim: int
    max_positions: int
    theta: float
    scaling: RopeScaling | None = None


Rope = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D / 2) or (B or 1, S, 1, D / 2)


def rope_of(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> Rope:
    """Rotary angles of the positions, in float32 at least, rounded to `dtype` (arXiv 2104.09864)."""
    exact = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(exact) * frequencies(rotary, positions)
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


Made = TypeVar("Made", Tensor, Rope)
KEPT = 8  # kinds and devices


def kept(make: Callable[[Rotary, torch.device], Made]) -> Callable[[Rotary, Tensor], Made]:
    """`make` on the device of a tensor that its result is used with, once for each kind and device.

    What a compiler, an export or a fake mode runs has a result of its own: one tensor of its kind, kept, would be in
    every later call, and theirs cannot hold a plain one.
    """
    results: dict[tuple[Rotary, torch.device], Made] = {}

    @wraps(make)
    def found_or_made(rotary: Rotary, beside: Tensor) -> Made:
        device = beside.device
        if torch.compiler.is_compiling() or type(beside) is not Tensor:
            return make(rotary, device)
        found = results.get((rotary, device))
        if found is None:
            found = make(rotary, device)
            if all(is_plain(x) for x in ((found,) if isinstance(found, Tensor) else found)):
                if len(results) >= KEPT:
                    results.clear()
                results[rotary, device] = found
        return found

    return found_or_made


def is_plain(x: Tensor) -> bool:
    """Whether x holds numbers of its own, now and later: a capture's memory is the graph's."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) is Tensor and not torch._is_functional_tensor(x) and not captured


@kept
def rope_tables(rotary: Rotary, device: torch.device) -> Rope:
    """cos and sin of all positions, float32 (max_positions, D / 2)."""
    with torch.inference_mode(False):
        cos, sin = rope_of(torch.arange(rotary.max_positions, device=device), rotary, torch.float32)
        return cos.squeeze(-2), sin.squeeze(-2)


@kept
def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """float32 (D / 2,): radians a position, stretched as its scaling says."""
    with torch.inference_mode(False):
        steps = torch.arange(0, rotary.head_dim, 2, dtype=torch.float32, device=device) / rotary.head_dim
        freq = 1.0 / rotary.theta**steps
        scaling = rotary.scaling
        if scaling is None:
            return freq
        if scaling.kind == "linear":
            return freq / scaling.factor
        if scaling.kind != "llama3":
            raise ValueError(f"rope_scaling: expected linear or llama3, got {scaling.kind!r}")
        turns = scaling.original_max_positions * freq / (2 * math.pi)  # over the context the model was trained on
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 1: as it is, 0: stretched by the factor
        return freq * kept + freq / scaling.factor * (1.0 - kept)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates pairs (x[..., i], x[..., i + D/2]) of x (..., heads, D): Llama's split halves."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
