"""What the device gives at this minute: matrix products in each dtype and reads, as torch reaches them."""

from __future__ import annotations

import time
from functools import cache

import torch
from duplex_attn.profile.timing import once

FRESH = 60.0  # seconds that a measurement stands for


def roof(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """GFLOP/s of an fp32 and a bf16 matrix product, GB/s of a read; the best of a few, once a minute."""
    return measured(device, tiny, int(time.monotonic() / FRESH))


@cache
def measured(device: torch.device, tiny: bool, minute: int) -> dict[str, float]:
    size = 64 if tiny else 1024 if device.type == "cpu" else 8192
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(size, size, device=device).to(dtype)
        best = min(once(lambda a=a: a @ a, device) for _ in range(2 if tiny else 8))
        found[f"{name}_gemm_gflops"] = 2 * size**3 / best / 1e9
    x = torch.ones(1 << (16 if tiny else 26), device=device)  # 256 MiB, past every cache
    found["read_gbytes_per_s"] = x.nbytes / min(once(x.sum, device) for _ in range(5)) / 1e9
    return found
