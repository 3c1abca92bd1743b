"""Beam search: the best sequences by the model's own probability, a fork of the pages where two share a beginning."""

from __future__ import annotations

import math

from torch import Tensor

from ..cache import PagedKVCache
from .request import Request, Sample
from .scheduler import Scheduler


def score(cumulative: float, length: int, penalty: float) -> float:
    return cumulative / length**penalty


def advance(request: Request, beams: list[Sample], logits: Tensor, cache: PagedKVCache, scheduler: Scheduler) -> None:
    """Each beam's best continuations, of which the best beam_width go on. logits (beams, vocab_size)."""
    width = request.params.beam_width
    logs = logits.double().log_softmax(-1)
    if not bool(logs.isfinite().any(-1).all()):
        raise ValueError("logits: expected a finite number to choose, got none")
    count = min(logs.shape[1], width + len(request.stop_tokens))  # of one beam, so many go on or end at most
    values, tokens = (x.tolist() for x in logs.topk(count))
    candidates = sorted(
        (
            (beam.cumulative + value, n, token)
            for n, beam in enumerate(beams)
            for value, token in zip(values[n], tokens[n], strict=True)
        ),
        key=lambda c: (-c[0], c[1], c[2]),
    )
    going: list[Sample] = []
    for cumulative, parent, token in candidates:
        ends = token in request.stop_tokens
        if ends or len(beams[parent].tokens) + 1 >= request.max_tokens:
            keep_ended(request, continued(beams[parent], token, cumulative, "stop" if ends else "length"))
        elif len(going) < width:
            going.append(continued(beams[parent], token, cumulative, None))
            going[-1].seq = beams[parent].seq
    take_forks(beams, going, cache, scheduler)
    request.samples = going
    if not going or settled(request, max(sample.cumulative for sample in going)):
        finish(request, scheduler)


def take_forks(beams: list[Sample], going: list[Sample], cache: PagedKVCache, scheduler: Scheduler) -> None:
    """Gives each sample that goes on a fork of its parent's sequence, and the parents' back: all of it or nothing."""
    parents = [sample.seq for sample in going]
    for sample in going:
        sample.seq = None
    try:
        for sample, parent in zip(going, parents, strict=True):
            if parent is not None:
                sample.seq = cache.fork(parent)
    except BaseException:
        for sample in going:
            scheduler.release(sample)
        raise
    for beam in beams:
        scheduler.release(beam)


def continued(beam: Sample, token: int, cumulative: float, reason: str | None) -> Sample:
    sample = beam.request.sample(0)
    sample.tokens, sample.cumulative, sample.finish_reason = [*beam.tokens, token], cumulative, reason
    return sample


def keep_ended(request: Request, sample: Sample) -> None:
    request.ended_beams.append(sample)
    request.ended_beams.sort(key=rank, reverse=True)
    del request.ended_beams[request.params.beam_width :]


def rank(sample: Sample) -> float:
    return score(sample.cumulative, len(sample.tokens), sample.request.params.length_penalty)


def settled(request: Request, best: float) -> bool:
    """No beam can still come among the best: its probability only falls, its length ends at max_tokens."""
    ended, penalty = request.ended_beams, request.params.length_penalty
    if len(ended) < request.params.beam_width:
        return False
    length = len(request.samples[0].tokens) + 1
    reachable = max(score(best, length, penalty), score(best, request.max_tokens, penalty))
    return rank(ended[-1]) >= reachable and not math.isnan(reachable)


def finish(request: Request, scheduler: Scheduler) -> None:
    for sample in request.samples:
        scheduler.release(sample)
    request.samples = request.ended_beams[: request.params.n]
    request.ended_beams = []
    for index, sample in enumerate(request.samples):
        sample.index = index
        for token in sample.tokens:
            sample.text.push(token)
        sample.show()
