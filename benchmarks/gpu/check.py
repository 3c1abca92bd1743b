"""No speed without the right numbers: samples of an answer against float64 on the same tensors, by the accuracy contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64  # of a sample
AT_ONCE = 2**28  # bytes of scores in float64
LENIENT = 4  # times as much as the contract: what only rules out a peer that computes something else


@dataclass(frozen=True)
class Check:
    """The largest error of what was sampled and what the contract allows; `share` is the worst error over its bound."""

    difference: float
    allowed: float
    share: float

    def passes(self, ours: bool) -> bool:
        return self.share <= (1 if ours else LENIENT)  # a NaN passes nothing

    def __str__(self) -> str:
        return f"{self.difference:.2e} from float64, {self.allowed:.2e} allowed"


@dataclass(frozen=True)
class Sample:
    """Some rows of one head: q (n, D), k (Sk, D), v (Sk, Dv), seen (n, Sk) and perhaps a bias (n, Sk)."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    bias: Tensor | None = None

    def plain(self, dtype: torch.dtype) -> Tensor:
        scores = self.q.to(dtype) @ self.k.to(dtype).T * self.q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self.bias.to(dtype)
        scores = scores.masked_fill(~self.seen, float("-inf"))
        return scores.softmax(-1).nan_to_num(0.0) @ self.v.to(dtype)


def seen(rows: Tensor, len_q: int, len_k: int, prefix: int, left: int | None, right: int | None) -> Tensor:
    """bool (n, len_k): the masks of docs/semantics.md for the rows i, the last query at the last key."""
    p = rows[:, None] + (len_k - len_q)
    j = torch.arange(len_k, device=rows.device)
    span = torch.ones(len(rows), len_k, dtype=torch.bool, device=rows.device)
    if left is not None:
        span &= j >= p - left
    if right is not None:
        span &= j <= p + right
    return span | (j < prefix)


def all_of(len_k: int) -> Callable[[Tensor], Tensor]:
    """Where every row sees every key: bool (n, len_k) of rows (n,)."""
    return lambda rows: rows.new_ones(len(rows), len_k, dtype=torch.bool)


def spread(n: int, most: int = ROWS, device: torch.device | str = "cpu") -> Tensor:
    """At most `most` of 0 .. n-1, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, most), device=device).round().long()


def outputs(samples: Iterable[tuple[Tensor, Sample]]) -> Check:
    """Each answer (n, Dv) beside what it should be."""
    return worst(
        against(found, sample.plain(torch.float64), sample.plain(sample.q.dtype), None) for found, sample in samples
    )


def against(found: Tensor, truth: Tensor, plain: Tensor, floor: float | None) -> Check:
    """Allowed is twice the error of the plain formula in the same dtype, and a floor of eps * (1 + max|truth|)."""
    if floor is None:
        floor = torch.finfo(plain.dtype).eps * (1 + float(truth.abs().max()))
    allowed = 2 * float((plain.double() - truth).abs().max()) + floor
    difference = float((found.double() - truth).abs().max())
    return Check(difference, allowed, difference / allowed)


def worst(checks: Iterable[Check]) -> Check:
    """That with the largest error for its bound; one with a NaN before all others."""
    return max(checks, key=lambda check: float("inf") if check.share != check.share else check.share)


@dataclass(frozen=True)
class Bias:
    """Of one head, as the call has it: `plane` makes (Sq, Sk) of it, and each of its gradients sums over so many rows."""

    values: Tensor
    plane: Callable[[Tensor], Tensor]
    rows: int


def gradients(
    found: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    visible: Callable[[Tensor], Tensor],
    bias: Bias | None = None,
) -> Check:
    """dq, dk, dv of one head, q (..., Sq, D) and so on, and that of a bias, against autograd of the formula in float64.

    `visible` is bool (n, Sk) of rows i (n,).
    """
    given = [q, k, v, *((bias.values,) if bias else ())]
    truth, largest_lse = of_formula(q, k, v, dout, visible, bias, torch.float64)
    plain, _ = of_formula(q, k, v, dout, visible, bias, q.dtype)
    unit = 2 * torch.finfo(q.dtype).eps * (1 + largest_lse) * float(dout.abs().max())
    reach = [float(x.abs().max()) for x in given[:3]]
    scale = q.shape[-1] ** -0.5
    floors = [unit * reach[2] * reach[1] * scale, unit * reach[2] * reach[0] * scale, unit]
    if bias is not None:  # rows err independently, and their sum is stored in its own dtype
        stored = torch.finfo(bias.values.dtype).eps * float(truth[3].abs().max())
        floors.append(unit * reach[2] * bias.rows**0.5 + stored)
    return worst(map(against, found, truth, plain, floors))


def of_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    visible: Callable[[Tensor], Tensor],
    bias: Bias | None,
    dtype: torch.dtype,
) -> tuple[list[Tensor], float]:
    """The gradients in `dtype` and the largest |lse|, some rows at a time: all scores of 16384 tokens are gigabytes.

    Sums over rows are carried on in float32 at least and rounded once, as one product of matrices does it.
    """
    q, k, v, dout = (x.detach().to(dtype) for x in (q, k, v, dout))
    wide = torch.promote_types(dtype, torch.float32)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    values = None if bias is None else bias.values.detach().to(dtype, copy=True).requires_grad_()
    dbias = None if values is None else torch.zeros_like(values, dtype=wide)
    dq, largest = [], 0.0
    rows = torch.arange(q.shape[-2], device=q.device)
    for part in rows.split(max(1, AT_ONCE // (8 * k[..., 0].numel()))):
        products = (q[..., part, :] @ k.mT).requires_grad_()
        scores = products * q.shape[-1] ** -0.5
        if bias is not None and values is not None:
            scores = scores + bias.plane(values)[..., part, :]
        scores = scores.masked_fill(~visible(part), float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        leaves = [products] if values is None else [products, values]
        dproducts, *more = torch.autograd.grad(weights, leaves, dout[..., part, :] @ v.mT)
        dq.append(dproducts @ k)
        dk += dproducts.mT.to(wide) @ q[..., part, :].to(wide)
        dv += weights.detach().mT.to(wide) @ dout[..., part, :].to(wide)
        if dbias is not None:
            dbias += more[0]
        largest = max(largest, float(scores.detach().logsumexp(-1).abs().max()))
    sums = [dk, dv] if dbias is None else [dk, dv, dbias]
    return [torch.cat(dq, -2), *(x.to(dtype) for x in sums)], largest
