"""A bar: something measured, beside the figure it must reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from duplex_attn.profile.timing import Spread, once

from .roof import roof

OURS = "duplex-attn"
ENOUGH = 0.002  # seconds: a round repeats shorter calls until it takes this long
BUDGET = 3.0  # seconds of one bar
FEWEST, MOST, TRIAL = 7, 60, 2  # rounds


@dataclass(frozen=True)
class Target:
    """`value` is to be reached from below (at_least) or not to be passed."""

    value: float
    at_least: bool
    unit: str

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g} {self.unit}".rstrip()


def faster(times: float) -> Target:
    """At least so many times as fast as the fastest peer."""
    return Target(times, True, "x")


def at_most(value: float, unit: str) -> Target:
    return Target(value, False, unit)


@dataclass(frozen=True)
class Bar:
    """One result. `measured` is what the target speaks of: a ratio of times, or what its unit says."""

    group: str
    name: str
    target: Target
    measured: Spread
    seconds: dict[str, Spread] = field(default_factory=dict)  # a call of each side, ours under "duplex-attn"
    flops: float | None = None  # of one call
    roof: dict[str, float] = field(default_factory=dict)
    gemm: float | None = None  # GFLOP/s of the roof that a call of its dtype has
    sweep: bool = False  # one of many shapes under one target
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.target.met(self.measured.median)

    def gflops(self) -> float | None:
        return None if self.flops is None or OURS not in self.seconds else self.flops / self.seconds[OURS].median / 1e9


@dataclass(frozen=True)
class Bench:
    """What a benchmark needs: the device, its roof at this minute, and where bars are kept."""

    benchmark: Any
    device: torch.device
    tiny: bool
    bars: list[Bar]

    def shape(self, batch: int, heads: int, seqlen: int, head_dim: int) -> tuple[int, int, int, int]:
        """The shape, or in a trial run (--tiny) one that costs nothing."""
        return (
            (min(batch, 2), min(heads, 2), max(seqlen // 16, 1), head_dim)
            if self.tiny
            else (batch, heads, seqlen, head_dim)
        )

    def tensor(self, *shape: int, dtype: torch.dtype, seed: int, requires_grad: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(shape, generator=generator).to(device=self.device, dtype=dtype)
        return made.requires_grad_(requires_grad)

    def compare(
        self,
        group: str,
        name: str,
        target: Target,
        ours: Callable[[], object],
        peers: dict[str, Callable[[], object]],
        *,
        flops: float | None = None,
        dtype: torch.dtype = torch.float32,
        sweep: bool = False,
        **facts: Any,
    ) -> Bar:
        """Times both sides and keeps the bar: how many times as fast as the faster peer."""
        top = roof(self.device, self.tiny)
        seconds = side_by_side(self, ours, peers)
        measured = ratio(seconds[OURS], seconds[fastest(seconds)])
        spreads = {side: Spread.of(found) for side, found in seconds.items()}
        gemm = top["fp32_gemm_gflops" if dtype == torch.float32 else "bf16_gemm_gflops"]
        return self.keep(Bar(group, name, target, measured, spreads, flops, top, gemm, sweep, facts))

    def keep(self, bar: Bar) -> Bar:
        self.benchmark.extra_info.update(
            bar=bar.name, measured=bar.measured.median, target=str(bar.target), met=bar.met
        )
        self.bars.append(bar)
        return bar


def side_by_side(
    bench: Bench, ours: Callable[[], object], peers: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Seconds of a call of each side, round by round: pytest-benchmark's setup times the peers, its target ours."""
    sides = {OURS: ours, **peers}
    for call in sides.values():
        call()
    probe = {name: once(call, bench.device) for name, call in sides.items()}
    repeat = max(1, round(ENOUGH / min(probe.values())))
    rounds = min(max(FEWEST, round(BUDGET / (sum(probe.values()) * repeat))), MOST)
    if bench.tiny:
        repeat, rounds = 1, TRIAL
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    def time_peers() -> None:
        for name, call in peers.items():
            seconds[name].append(once(call, bench.device, repeat))

    def time_ours() -> None:
        seconds[OURS].append(once(ours, bench.device, repeat))

    bench.benchmark.extra_info["calls_per_round"] = repeat
    bench.benchmark.pedantic(time_ours, setup=time_peers, rounds=rounds, warmup_rounds=1)
    return {name: found[1:] or found for name, found in seconds.items()}  # less the warm-up round


def fastest(seconds: dict[str, list[float]]) -> str:
    peers = [name for name in seconds if name != OURS]
    return min(peers, key=lambda name: Spread.of(seconds[name]).median)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return Spread.of([t / o for o, t in zip(ours, theirs, strict=True)])
