"""Times of calls on a card: warm clocks, cold caches, and the host out of the way; on a CPU, the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from duplex_attn.profile.timing import Name, in_turn

WARM = 0.5  # seconds of matrix products until the clocks have risen
AHEAD = 1_000_000  # cycles, half a millisecond, that the card waits before a timed call, while the host enqueues it
FEWEST, MOST = 5, 50  # rounds
HOST_CALLS = 100  # in one sample of the host's time
GIB = 2**30


class Clock:
    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.on_card = device.type == "cuda"
        if self.on_card:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.zeros(2 * l2 // 4, device=device)

    def warm(self) -> None:
        if not self.on_card:
            return
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.monotonic() + WARM
        while time.monotonic() < end:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize(self.device)

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call on the card, with none of its inputs in the L2 cache."""
        if not self.on_card:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.sum()  # written, it would leave the timed call to write it back
        torch.cuda._sleep(AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def on_host(self, call: Callable[[], Any]) -> float:
        """Seconds until a call returns to Python, the mean of many; the card works meanwhile and is waited for after."""
        self.wait()
        calls = 1 if self.tiny else HOST_CALLS
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        taken = (time.perf_counter() - begin) / calls
        self.wait()
        return taken

    def wait(self) -> None:
        if self.on_card:
            torch.cuda.synchronize(self.device)

    def rounds(
        self, calls: Mapping[Name, Callable[[], Any]], seconds: float, on_host: bool = False
    ) -> dict[Name, list[float]]:
        """Samples of each, round by round, so that what disturbs one disturbs all; about `seconds` in all."""
        sample = self.on_host if on_host else self.once
        count = 1
        if not self.tiny:
            begin = time.perf_counter()
            for call in calls.values():
                sample(call)
            count = min(max(int(seconds / (time.perf_counter() - begin)), FEWEST), MOST)
        found: dict[Name, list[float]] = {name: [] for name in calls}
        for index in range(count):
            for name in in_turn(list(calls), index):
                found[name].append(sample(calls[name]))
        return found

    def ceilings(self) -> dict[str, float]:
        """What the card itself gives: FLOP/s of a bf16 matrix product, bytes/s of a copy (read + written) and of a read."""
        side, size = (64, 2**20) if self.tiny else (8192, 4 * GIB)
        if self.on_card:
            size = min(size, torch.cuda.mem_get_info(self.device)[0] // 4)
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        calls = {
            "matmul_flops": lambda: a @ b,
            "copy_bytes": lambda: target.copy_(source),
            "read_bytes": lambda: source.sum(),
        }
        amounts = {"matmul_flops": 2 * side**3, "copy_bytes": 2 * source.nbytes, "read_bytes": source.nbytes}
        seconds = {name: sorted(found) for name, found in self.rounds(calls, 1.0).items()}
        return {name: amounts[name] / found[len(found) // 2] for name, found in seconds.items()}
