"""Masks that peers pay for with a tensor: a bidirectional prefix, and a ragged batch."""

from __future__ import annotations

from functools import partial

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .bar import Bench, faster
from .exact import verify, visible

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefix_lm(bench: Bench, dtype: str) -> None:
    """Causal but for a prefix of a quarter: against compiled FlexAttention and SDPA with a boolean mask."""
    batch, heads, seqlen, head_dim = bench.shape(1, 12, 2048, 64)
    prefix = seqlen // 4
    q, k, v = (bench.tensor(batch, heads, seqlen, head_dim, dtype=DTYPES[dtype], seed=i) for i in range(3))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    mask = da.prefix_lm(prefix)
    seen = visible(mask, seqlen, seqlen, 0, bench.device)
    blocks = create_block_mask(
        lambda b, h, i, j: (j < prefix) | (j <= i), None, None, seqlen, seqlen, device=bench.device.type
    )
    compiled = torch.compile(flex_attention, fullgraph=True)
    ours = partial(da.attention, *turned, mask)
    peers = {
        "FlexAttention": torch.no_grad()(lambda: compiled(q, k, v, block_mask=blocks)),
        "sdpa with mask": lambda: F.scaled_dot_product_attention(q, k, v, seen),
    }
    verify(ours(), *turned, mask)
    for peer in peers.values():
        verify(peer().transpose(1, 2), *turned, mask)
    flops = 4.0 * batch * heads * head_dim * int(seen.sum())
    name = f"{dtype} prefix 512 of (1, 12, 2048, 64)"
    bench.compare("prefix-LM", name, faster(2.5), ours, peers, flops=flops, dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(bench: Bench, dtype: str) -> None:
    """16 sequences of 16 to 512 tokens, half of the padded batch: packed here, padded with a mask in SDPA."""
    batch, heads, longest, head_dim = 16, 12, 32 if bench.tiny else 512, 64
    lengths = [longest * (2 * index + 1) // (2 * batch) for index in range(batch - 1)] + [longest]
    seqlens = torch.tensor(lengths, device=bench.device)
    cu_seqlens = F.pad(seqlens.cumsum(0), (1, 0)).int()
    q, k, v = (bench.tensor(batch, longest, heads, head_dim, dtype=DTYPES[dtype], seed=i) for i in range(3))
    kept = torch.arange(longest, device=bench.device) < seqlens[:, None]
    packed = [x[kept] for x in (q, k, v)]  # (total, heads, head_dim)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    ours = partial(da.varlen_attention, *packed, cu_seqlens, cu_seqlens, longest, longest, da.full())
    peers = {"padded sdpa": lambda: F.scaled_dot_product_attention(*turned, kept[:, None, None, :])}
    for index, out in enumerate(ours().split(lengths)):
        n = lengths[index]
        verify(out[None], *(x[index : index + 1, :n] for x in (q, k, v)), da.full())
    padding = 1 - sum(lengths) / (batch * longest)
    flops = 4.0 * heads * head_dim * sum(n * n for n in lengths)
    name = f"{dtype} 16 sequences up to 512, {padding:.0%} padding"
    bench.compare("ragged varlen", name, faster(2.5), ours, peers, flops=flops, dtype=DTYPES[dtype], padding=padding)
