"""Rotary positions: the angles of each position, and queries and keys turned by them (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .rope_scaling import KINDS, RopeScaling


@dataclass(frozen=True)
class Rotary:
    """One kind of rotary positions."""

    dim: int  # of each head's dimensions, the first 2R, which are rotated
    max_positions: int
    theta: float
    scaling: RopeScaling | None = None
    interleaved: bool = False
    long: bool = False  # of a text that the scaling counts as long


class Rope(NamedTuple):
    """cos and sin (T, 1, R) or (B or 1, S, 1, R), of all positions (max_positions, R)."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rope_of(positions: Tensor, rotary: Rotary, dtype: torch.dtype) -> Rope:
    """Rotary angles of the positions, in float32 at least, rounded to `dtype` (arXiv 2104.09864)."""
    exact = torch.promote_types(dtype, torch.float32)
    angles = (positions[..., None].to(exact) * frequencies(rotary, positions)).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    if rotary.scaling is not None and (magnitude := rotary.scaling.magnitude) != 1:
        cos, sin = cos * magnitude, sin * magnitude
    return Rope(cos.to(dtype), sin.to(dtype), rotary.interleaved)


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
            if all(is_plain(x) for x in ((found,) if isinstance(found, Tensor) else found[:2])):
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
    """Of all positions, float32."""
    with torch.inference_mode(False):
        rope = rope_of(torch.arange(rotary.max_positions, device=device), rotary, torch.float32)
        return rope._replace(cos=rope.cos.squeeze(-2), sin=rope.sin.squeeze(-2))


@kept
def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """float32 (R,): radians a position, stretched as its scaling says."""
    with torch.inference_mode(False):
        steps = torch.arange(0, rotary.dim, 2, dtype=torch.float32, device=device) / rotary.dim
        periods = rotary.theta**steps
        if rotary.scaling is None:
            return 1.0 / periods
        return KINDS[rotary.scaling.kind](rotary.scaling, periods, rotary.theta, rotary.long)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates the first 2R dimensions of x (..., heads, D): pairs (i, i + R), Llama's split halves, or (2i, 2i + 1) where
    interleaved, the paper's."""
    cos, sin, interleaved = rope
    turned, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), -1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return torch.cat((torch.stack((a, b), -1).flatten(-2), rest), -1)
    return torch.cat((a, b, rest), -1)
