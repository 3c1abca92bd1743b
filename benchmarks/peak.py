"""One side's peak memory in forward + backward, as JSON: peak.py SIDE DTYPE MASK DEVICE BATCH HEADS SEQLEN HEAD_DIM."""

from __future__ import annotations

import json
import sys

import duplex_attn as da
import torch
import torch.nn.functional as F
from duplex_attn.profile.memory import peak_memory


def main(side: str, dtype: str, mask: str, device: str, *sizes: str) -> None:
    batch, heads, seqlen, head_dim = map(int, sizes)
    step_of(side, mask, *tensors(dtype, device, batch, heads, 64, head_dim))()  # loads what is loaded once
    q, k, v, dout = tensors(dtype, device, batch, heads, seqlen, head_dim)
    rise = peak_memory(step_of(side, mask, q, k, v, dout), torch.device(device))
    given = sum(x.nbytes for x in (q, k, v, dout))
    lse = 4 * batch * heads * seqlen
    needed = 2 * given + lse  # q, k, v, out, their gradients, and lse
    print(json.dumps({"peak_bytes": None if rise is None else given + rise, "needed_bytes": needed}))


def tensors(dtype: str, device: str, batch: int, heads: int, seqlen: int, head_dim: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, (B, S, H, D)."""
    made = [torch.randn(batch, seqlen, heads, head_dim).to(device, getattr(torch, dtype)) for _ in range(4)]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def step_of(side: str, mask: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor):
    def ours() -> None:
        out = da.attention(q, k, v, da.causal() if mask == "causal" else da.full())
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        del out, gradients

    def sdpa() -> None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=mask == "causal")
        gradients = torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))
        del out, gradients

    return sdpa if side == "sdpa" else ours


if __name__ == "__main__":
    main(*sys.argv[1:])
