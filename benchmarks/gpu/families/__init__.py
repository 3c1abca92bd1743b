"""Workloads as tensors and calls: each module has `build(workload, device)`."""

from __future__ import annotations

import importlib

import torch

from ..workload import Problem, Workload


def build(workload: Workload, device: torch.device) -> Problem:
    torch.manual_seed(0)
    return importlib.import_module(f".{workload.family}", __package__).build(workload, device)


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random, never zeros: they are faster, and hide what was not written."""
    return torch.randn(shape, device=device).to(dtype)


def lengths(workload: Workload) -> list[int]:
    """Evenly over shortest .. queries, in an order that is not theirs."""
    low, high, n = workload.shortest, workload.queries, workload.batch
    ordered = [low + (high - low) * index // max(n - 1, 1) for index in range(n)]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [ordered[index] for index in order]
