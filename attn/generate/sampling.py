"""From logits to tokens. No row depends on another, and no draw on an earlier one: each has its own random number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .params import SamplingParams

NO_TOKEN = -1
NUCLEUS = 256  # tokens looked at first to find a nucleus; most are smaller
COLDEST = 1e-6  # temperature, below which nothing is left but the likeliest
_MASK = 2**64 - 1


class Draw(NamedTuple):
    """What one row of logits is asked for."""

    params: SamplingParams
    uniform: float  # in [0, 1)
    banned: Collection[int] = ()


class TokenLogprob(NamedTuple):
    """Of a chosen token, and of the likeliest ones in its place."""

    logprob: float
    top: dict[int, float]


def uniform(seed: int, *counters: int) -> float:
    """A number in [0, 1) that is a function of its arguments: SplitMix64 (Steele et al. 2014) of each in turn."""
    x = 0
    for counter in (seed, *counters):
        x = (x ^ counter) + 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        x ^= x >> 31
    return (x >> 16) * 2.0**-48  # so short that its product with a sum of probabilities stays below the sum


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each row of logits (R, vocab_size); NO_TOKEN where they hold no finite number to choose."""
    logits = logits.float()
    if any(draw.banned for draw in draws):
        logits = logits.clone()
        for row, draw in zip(logits, draws, strict=True):
            if draw.banned:
                row[list(draw.banned)] = float("-inf")
    chosen = logits.argmax(-1)
    drawn = [r for r, draw in enumerate(draws) if draw.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = sample(logits[rows], [draws[r] for r in drawn])
    best = logits.gather(1, chosen[:, None])[:, 0]
    return torch.where(best.isfinite(), chosen, NO_TOKEN).tolist()


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """int64 (R,): the token at which the sum of the kept probabilities, in the order of ids, passes the number drawn."""
    probabilities = kept(logits, [draw.params for draw in draws])
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    numbers = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64, device=logits.device)
    tokens = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True)[:, 0]
    return torch.where(sums[:, -1].isfinite(), tokens, logits.argmax(-1))  # else what is not finite, for all to see


def kept(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities (R, vocab_size) after temperature, 0 for what top_k, top_p and min_p take away; not rescaled."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    logits = (logits - logits.amax(-1, keepdim=True)) / column([max(p.temperature, COLDEST) for p in params])
    limited = [r for r, p in enumerate(params) if 0 < p.top_k < logits.shape[1]]
    if limited:
        counts = [params[r].top_k for r in limited]
        rows = logits[limited]
        least = rows.topk(max(counts)).values.gather(1, torch.tensor(counts, device=logits.device)[:, None] - 1)
        logits[limited] = rows.masked_fill(rows < least, float("-inf"))
    probabilities = logits.softmax(-1)
    least = column([p.min_p for p in params]) * probabilities.amax(-1, keepdim=True)
    if any(p.top_p < 1 for p in params):
        least = torch.maximum(least, nucleus(probabilities, column([p.top_p for p in params])))
    return probabilities.masked_fill(probabilities < least, 0.0)


def nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """(R, 1): the smallest of the largest probabilities that reach top_p (R, 1) together."""
    width = NUCLEUS
    while True:
        width = min(width, probabilities.shape[1])
        best = probabilities.topk(width).values
        sums = best.cumsum(-1, dtype=torch.float64)
        if width == probabilities.shape[1] or bool((sums[:, -1:] >= top_p).all()):
            break
        width *= 8
    needed = (sums - best < top_p).sum(-1, keepdim=True)
    least = best.gather(1, (needed - 1).clamp(min=0))
    return least.masked_fill(top_p >= 1, 0.0)


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprob | None]:
    """Of each row's token and its `counts` likeliest ones, in one pass over the rows that want any."""
    rows = [r for r, count in enumerate(counts) if count is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return found
    logs = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(-1)
    most = min(max(count for count in counts if count is not None), logs.shape[1])
    values, ids = (x.tolist() for x in logs.topk(most))
    own = logs.gather(1, torch.tensor([[tokens[r]] for r in rows], device=logs.device))[:, 0].tolist()
    for at, r in enumerate(rows):
        count = counts[r] or 0
        found[r] = TokenLogprob(own[at], dict(zip(ids[at][:count], values[at][:count], strict=True)))
    return found
