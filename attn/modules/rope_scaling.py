"""Rotary frequencies stretched to contexts longer than those of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch by `factor`: "linear" (Chen et al. 2023, arXiv 2306.15595), "llama3" (Llama 3.1,
    2407.21783), "yarn" (Peng et al. 2023, 2309.00071) or "longrope" (Ding et al. 2024, 2402.13753).

    "longrope" has factors for each frequency: `short_factors` for texts up to `original_max_positions`, `long_factors` for
    longer ones. Keys that were rotated by the former are none of a longer text, so a text that grows is computed anew there.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0  # of llama3: turns over the original context below which a frequency is stretched,
    high_freq_factor: float = 4.0  # and above which it is not
    original_max_positions: int = 8192  # of training
    attention_factor: float | None = None  # of cos and sin with yarn and longrope; None: as their papers have it
    beta_fast: float = 32.0  # of yarn: turns over the original context above which a frequency is not stretched,
    beta_slow: float = 1.0  # and below which it is
    truncate: bool = True  # yarn's ramp begins and ends at whole dimensions
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens has other frequencies than a short one."""
        return self.kind == "longrope" and length > self.original_max_positions

    @property
    def magnitude(self) -> float:
        """Of cos and sin."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions))


# Of periods float32 (R,), positions a radian as theta has them: radians a position, as the scaling has them.
def linear(scaling: RopeScaling, periods: Tensor, theta: float, long: bool) -> Tensor:
    return 1.0 / periods / scaling.factor


def llama3(scaling: RopeScaling, periods: Tensor, theta: float, long: bool) -> Tensor:
    freq = 1.0 / periods
    turns = scaling.original_max_positions * freq / (2 * math.pi)  # over the context the model was trained on
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 1: as it is, 0: stretched by the factor
    return freq * kept + freq / scaling.factor * (1.0 - kept)


def yarn(scaling: RopeScaling, periods: Tensor, theta: float, long: bool) -> Tensor:
    size = 2 * len(periods)

    def dimension(turns: float) -> float:
        """Which has so many turns over the original context."""
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    pairs = torch.arange(len(periods), dtype=torch.float32, device=periods.device)
    kept = 1 - ((pairs - low) / (high - low or 0.001)).clamp(0.0, 1.0)  # as of llama3, by the dimension
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def longrope(scaling: RopeScaling, periods: Tensor, theta: float, long: bool) -> Tensor:
    factors = scaling.long_factors if long else scaling.short_factors
    return 1.0 / (torch.tensor(factors, dtype=torch.float32, device=periods.device) * periods)


KINDS: dict[str, Callable[[RopeScaling, Tensor, float, bool], Tensor]] = {
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def check_scaling(scaling: RopeScaling, rotary_dim: int) -> None:
    """Raises ValueError, naming what is wrong."""
    if scaling.kind not in KINDS:
        raise ValueError(f"rope_scaling: expected one of {', '.join(KINDS)}, got {scaling.kind!r}")
    if scaling.kind == "longrope":
        for name in ("short_factors", "long_factors"):
            if len(factors := getattr(scaling, name)) != rotary_dim // 2:
                raise ValueError(f"{name}: expected one for each of {rotary_dim // 2} frequencies, got {len(factors)}")
