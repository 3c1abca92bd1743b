"""A few queries of every sequence against keys in a row: generation over a cache that is no pool of pages, as transformers has it."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .bar import Bench, faster
from .gpu.check import against

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {  # batch, rows, heads of q and of k, keys, padding on the left
    "1 x 4096, 32/8 heads": (1, 1, 32, 8, 4096, False),
    "4 x 2048 padded on the left, 32/8 heads": (4, 1, 32, 8, 2048, True),
    "4 x 2048, four tokens, 32/8 heads": (4, 4, 32, 8, 2048, False),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(bench: Bench, dtype: str, shape: str) -> None:
    batch, rows, heads, heads_kv, keys, padded = SHAPES[shape]
    keys = keys // 16 if bench.tiny else keys
    q = bench.tensor(batch, heads, rows, 128, dtype=DTYPES[dtype], seed=0)
    k, v = (bench.tensor(batch, heads_kv, keys, 128, dtype=DTYPES[dtype], seed=seed) for seed in (1, 2))
    starts = torch.arange(batch, dtype=torch.int32, device=bench.device) * (keys // 8) if padded else None
    j, i = torch.arange(keys, device=bench.device), torch.arange(rows, device=bench.device)
    seen = (j <= i[:, None] + keys - rows).expand(batch, 1, rows, keys)
    if starts is not None:
        seen = seen & (j >= starts[:, None, None, None])
    mask = seen if padded or rows > 1 else None

    def sdpa(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)

    def ours() -> Tensor:
        lengths = {} if starts is None else {"starts_k": starts, "seqlens_k": keys - starts}
        return da.attention(*(x.transpose(1, 2) for x in (q, k, v)), da.causal(), **lengths).transpose(1, 2)

    truth = sdpa(*(x.double() for x in (q, k, v)))
    assert against(ours(), truth, sdpa(q, k, v), None).passes(ours=True)
    peers = {"SDPA": lambda: sdpa(q, k, v)}
    bench.compare("a few new tokens", f"{dtype} {shape}", faster(1.2), ours, peers, dtype=DTYPES[dtype])
