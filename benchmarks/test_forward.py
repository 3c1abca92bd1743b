"""Forward against F.scaled_dot_product_attention: the shapes that have a bar, and a sweep that must never be slower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from duplex_attn.profile.timing import once
from torch import Tensor

from .bar import Bench, faster
from .exact import verify

MASKS = {"full": da.full(), "causal": da.causal()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {
    ("bf16", (8, 12, 512, 64)): 1.6,
    ("bf16", (1, 16, 2048, 128)): 1.6,
    ("fp32", (8, 12, 512, 64)): 1.3,
    ("fp32", (1, 16, 2048, 128)): 1.15,
}
# (batch, heads, heads_kv, queries, keys, head_dim)
SWEEP = [
    (1, 12, 12, 128, 128, 64),
    (1, 12, 12, 512, 512, 64),
    (1, 12, 12, 1024, 1024, 64),
    (1, 12, 12, 4096, 4096, 64),
    (32, 12, 12, 128, 128, 64),
    (64, 12, 12, 32, 32, 64),
    (4, 16, 16, 512, 512, 32),
    (2, 16, 16, 512, 512, 80),
    (2, 16, 16, 512, 512, 96),
    (1, 32, 8, 1024, 1024, 128),
    (1, 8, 8, 1024, 1024, 256),
    (8, 32, 8, 1, 4096, 128),
    (16, 12, 12, 1, 1024, 64),
    (4, 12, 12, 128, 1024, 64),
    (2, 12, 12, 1024, 100, 64),
    (1, 12, 12, 1000, 1000, 64),
]
WORTH = 100e-6  # seconds of SDPA from which on it counts


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "shape"), BARS, ids=str)
def test_forward(bench: Bench, dtype: str, shape: tuple[int, int, int, int], mask: str) -> None:
    batch, heads, seqlen, head_dim = bench.shape(*shape)
    ours, peers, flops = forward(bench, (batch, heads, heads, seqlen, seqlen, head_dim), dtype, mask)
    target, name = faster(BARS[dtype, shape]), f"{dtype} {mask} {shape}"
    bench.compare("forward", name, target, ours, peers, flops=flops, dtype=DTYPES[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SWEEP, ids=str)
def test_never_slower(bench: Bench, shape: tuple[int, ...], dtype: str, mask: str) -> None:
    batch, heads, heads_kv, queries, keys, head_dim = shape
    if mask == "causal" and queries > 1 and queries != keys:
        pytest.skip("SDPA's is_causal stands at the top left")
    if bench.tiny:
        batch, queries, keys = 1, min(queries, 16), min(keys, 16)
    ours, peers, flops = forward(bench, (batch, heads, heads_kv, queries, keys, head_dim), dtype, mask)
    if once(peers["sdpa"], bench.device, repeat=20) < WORTH and not bench.tiny:
        pytest.skip("SDPA takes less than 100 us")
    name = f"{dtype} {mask} {shape}"
    bench.compare("never slower", name, faster(1.0), ours, peers, flops=flops, dtype=DTYPES[dtype], sweep=True)


def forward(
    bench: Bench, shape: tuple[int, ...], dtype: str, mask: str
) -> tuple[Callable[[], Tensor], dict[str, Callable[[], Tensor]], float]:
    """Ours, verified, SDPA on the same tensors (B, H, S, D), and the FLOPs of a call."""
    batch, heads, heads_kv, queries, keys, head_dim = shape
    q = bench.tensor(batch, heads, queries, head_dim, dtype=DTYPES[dtype], seed=0)
    k = bench.tensor(batch, heads_kv, keys, head_dim, dtype=DTYPES[dtype], seed=1)
    v = bench.tensor(batch, heads_kv, keys, head_dim, dtype=DTYPES[dtype], seed=2)
    causal = mask == "causal" and queries > 1  # one query sees every key
    ours = partial(da.attention, *(x.transpose(1, 2) for x in (q, k, v)), MASKS[mask])
    sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=heads != heads_kv)
    verify(ours(), *(x.transpose(1, 2) for x in (q, k, v)), MASKS[mask])
    share = (queries + 1) / (2 * queries) if causal else 1.0
    return ours, {"sdpa": sdpa}, 4 * batch * heads * queries * keys * head_dim * share
