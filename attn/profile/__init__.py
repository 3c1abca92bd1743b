"""The profiler behind `duplex-attn profile`: the same weights through plain attention, SDPA and this package."""
