"""What a call costs inside a CUDA graph, over its kernel alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..workload import Peer, Problem, Unavailable, Workload
from . import dense

CALLS = 20  # in a graph


def build(w: Workload, device: torch.device) -> Problem:
    eager = dense.build(w, device)

    def ours(backend: str) -> Callable[[], Any]:
        return captured(eager.ours(backend), device)

    def peer(make: Callable[[], Peer]) -> Callable[[], Peer]:
        def made() -> Peer:
            peer = make()
            return Peer(captured(peer.call, device), peer.answer)

        return made

    peers = {name: peer(make) for name, make in eager.peers.items()}

    def facts(replay: Callable[[], Any]) -> dict[str, float]:
        return {"kernel_seconds": kernel_seconds(replay) / CALLS} if device.type == "cuda" else {}

    return replace(eager, ours=ours, peers=peers, repeat=CALLS if device.type == "cuda" else 1, facts=facts)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Replays CALLS of it as one graph and returns the last one's output; without a card it is just the call."""
    call()
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            found = call()

    def replay() -> Any:
        graph.replay()
        return found

    return replay


def kernel_seconds(call: Callable[[], Any]) -> float:
    """Of the kernels of one call, as the profiler has them; Unavailable where it sees none."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    micro = sum(event.self_device_time_total for event in profile.key_averages())
    if micro <= 0:
        raise Unavailable("the profiler saw no kernel")
    return micro * 1e-6
