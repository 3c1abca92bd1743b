"""What a test does to a device: replays, streams, load and room; on a CPU, what stands for each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ..lanes import Lane

GIB = 2**30


def has_card(lane: Lane) -> bool:
    return lane.device == "cuda"


def sized(lane: Lane, card: int, small: int) -> int:
    return card if has_card(lane) else small


def widest(lane: Lane) -> torch.dtype:
    """The most exact that the backend takes."""
    return torch.bfloat16 if lane.backend == "cuda" else torch.float32


def replayable(call: Callable[[], Any], lane: Lane) -> Callable[[], Any]:
    """`call` captured in a CUDA graph: its inputs may change in place, its outputs are always the same tensors."""
    if not has_card(lane):
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiled, and whatever is allocated once
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return outputs

    return replay


@contextmanager
def load(lane: Lane) -> Iterator[None]:
    """Something else works on the device all the time: matrix products on another stream, or in another thread."""
    stop = threading.Event()

    def work() -> None:
        x = torch.randn(sized(lane, 4096, 64), sized(lane, 4096, 64), device=lane.device)
        stream = torch.cuda.Stream() if has_card(lane) else None
        with torch.cuda.stream(stream):
            while not stop.is_set():
                for _ in range(4):
                    x @ x
                if stream is not None:
                    stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def needs_room(lane: Lane, size: int) -> None:
    """Skips where the card has fewer free bytes."""
    if has_card(lane):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"{size / GIB:.0f} GiB are needed, {free / GIB:.0f} are free")
