"""No speed without the right numbers: outputs against float64, by the accuracy contract, before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from duplex_attn import Mask
from torch import Tensor

SAMPLES = 4  # heads that are checked, spread over batch and heads: float64 scores are large


@dataclass(frozen=True)
class Check:
    difference: float
    allowed: float


def visible(mask: Mask, queries: int, keys: int, sequence: int, device: torch.device) -> Tensor:
    """bool (queries, keys): the masks of docs/semantics.md, as written."""
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    p = i + (keys - queries if mask.align == "bottom_right" else 0)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if mask.left is not None:
        seen &= j >= p - mask.left
    if mask.right is not None:
        seen &= j <= p + mask.right
    prefix = mask.prefix[sequence] if isinstance(mask.prefix, Tensor) else mask.prefix
    return seen | (j < prefix)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of one head in its own dtype: q (Sq, D), k (Sk, D), v (Sk, Dv)."""
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v  # a row that sees nothing is 0


def verify(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Check:
    """out (B, Sq, Hq, Dv) of q (B, Sq, Hq, D), k and v (B, Sk, Hk, D): raises AssertionError where it is wrong."""
    batch, queries, heads = q.shape[:3]
    group = heads // k.shape[2]
    worst, allowed = 0.0, 0.0
    for sample in range(min(SAMPLES, batch * heads)):
        b, h = divmod(sample * (batch * heads - 1) // max(SAMPLES - 1, 1), heads)
        one = q[b, :, h], k[b, :, h // group], v[b, :, h // group]
        seen = visible(mask, queries, k.shape[1], b, q.device)
        truth = plain(*(x.double() for x in one), seen)
        bound = bound_of(plain(*one, seen), truth)
        difference = float((out[b, :, h].double() - truth).abs().max())
        assert difference <= bound, f"batch {b}, head {h}: {difference:.2e} from float64, {bound:.2e} allowed"
        worst, allowed = max(worst, difference), max(allowed, bound)
    return Check(worst, allowed)


def bound_of(formula: Tensor, truth: Tensor) -> float:
    """Twice the error of the plain formula in the same dtype, and a floor of eps * (1 + max|truth|)."""
    error = float((formula.double() - truth).abs().max())
    return 2 * error + torch.finfo(formula.dtype).eps * (1 + float(truth.abs().max()))
