"""Forward and backward together, as a training step has them, against SDPA's."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .bar import Bench, faster
from .exact import verify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {"fp32": 1.2, "bf16": 1.4}
MASKS = {"full": da.full(), "causal": da.causal()}
PASSES = 3.5  # forward has 2 matrix products, backward 5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_backward(bench: Bench, dtype: str, mask: str) -> None:
    batch, heads, seqlen, head_dim = bench.shape(1, 12, 1024, 64)
    shape = (batch, heads, seqlen, head_dim)
    q, k, v = (bench.tensor(*shape, dtype=DTYPES[dtype], seed=i, requires_grad=True) for i in range(3))
    dout = bench.tensor(*shape, dtype=DTYPES[dtype], seed=3)

    def ours() -> tuple[Tensor, ...]:
        out = da.attention(*(x.transpose(1, 2) for x in (q, k, v)), MASKS[mask])
        return torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))

    def sdpa() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")
        return torch.autograd.grad(out, (q, k, v), dout)

    turned = [x.detach().transpose(1, 2) for x in (q, k, v)]
    verify(da.attention(*turned, MASKS[mask]), *turned, MASKS[mask])
    verify_gradients(ours(), q, k, v, dout, causal=mask == "causal")
    flops = PASSES * 4 * batch * heads * seqlen * seqlen * head_dim * (0.5 if mask == "causal" else 1.0)
    name, target = f"{dtype} {mask} (1, 12, 1024, 64)", faster(TARGETS[dtype])
    bench.compare("forward and backward", name, target, ours, {"sdpa": sdpa}, flops=flops, dtype=DTYPES[dtype])


def verify_gradients(found: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> None:
    """Against autograd of the plain formula in float64, with the bound that the contract gives gradients."""
    seqlen, head_dim = q.shape[2:]
    hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1) if causal else None

    def gradients(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        scores = leaves[0] @ leaves[1].mT * head_dim**-0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1) @ leaves[2]
        return torch.autograd.grad(out, leaves, dout.to(dtype)), scores.detach().logsumexp(-1)

    truth, lse = gradients(torch.float64)
    formula, _ = gradients(q.dtype)
    floor = 2 * torch.finfo(q.dtype).eps * (1 + float(lse.abs().max())) * float(dout.abs().max())
    largest = [float(x.detach().abs().max()) for x in (q, k, v)]
    reach = [largest[2] * largest[1] * head_dim**-0.5, largest[2] * largest[0] * head_dim**-0.5, 1.0]
    for name, ours, plain, exact, scale in zip(("dq", "dk", "dv"), found, formula, truth, reach, strict=True):
        difference = float((ours.double() - exact).abs().max())
        allowed = 2 * float((plain.double() - exact).abs().max()) + floor * scale
        assert difference <= allowed, f"{name}: {difference:.2e} from float64, {allowed:.2e} allowed"
