"""Measures workloads: the time of all first, then their memory, then their difference from float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .memory import peak_memory
from .report import Comparison, Measurement
from .timing import Spread, interleaved, speed
from .workloads import Workload

WARMUP = 1

Step = Callable[[str], None]


def steps_of(workload: Workload, rounds: int) -> int:
    """How often `measure` tells `step` of this workload."""
    return len(workload.systems) * (WARMUP + rounds + 2) + 1


def measure(workloads: Sequence[Workload], rounds: int, device: torch.device, step: Step) -> list[Comparison]:
    """All systems on each workload. `step` hears what was just done, in words."""
    seconds = [time_of(workload, rounds, device, step) for workload in workloads]
    peaks = [peaks_of(workload, device, step) for workload in workloads]
    differences = [differences_of(workload, step) for workload in workloads]
    return [compared(*found) for found in zip(workloads, seconds, peaks, differences, strict=True)]


def time_of(workload: Workload, rounds: int, device: torch.device, step: Step) -> dict[str, list[float]]:
    return interleaved(workload.runs, rounds, device, WARMUP, each=lambda: step(f"{workload.name}: latency"))


def peaks_of(workload: Workload, device: torch.device, step: Step) -> dict[str, int | None]:
    peaks = {}
    for system, run in workload.runs.items():
        peaks[system] = peak_memory(run, device)
        step(f"{workload.name}: peak memory")
    return peaks


def differences_of(workload: Workload, step: Step) -> dict[str, float]:
    exact = workload.exact()
    step(f"{workload.name}: float64")
    differences = {}
    for system, outputs in workload.checked.items():
        differences[system] = float((outputs().double() - exact).abs().max())
        step(f"{workload.name}: difference from float64")
    return differences


def compared(
    workload: Workload, seconds: dict[str, list[float]], peaks: dict[str, int | None], differences: dict[str, float]
) -> Comparison:
    names = workload.systems
    measurements = []
    for system, name in names.items():
        spread = Spread.of(seconds[system])
        measurements.append(
            Measurement(
                system=name,
                difference=differences[system],
                seconds=spread,
                tokens_per_second=workload.tokens / spread.median,
                peak_bytes=peaks[system],
                speed={names[peer]: speed(seconds, system, peer) for peer in names if peer != system},
            )
        )
    return Comparison(workload.name, workload.detail, workload.tokens, measurements)
