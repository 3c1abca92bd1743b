"""Which tokens a step computes where a bidirectional prefix, or what several samples share, meets a budget or a small pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from duplex_attn.generate import Engine, Request, SamplingParams, cache_for
from duplex_attn.generate.verify import Accept, Draft, Replace, Verdict
from duplex_attn.modules import GPT

LONG = [3 + n % 90 for n in range(30)]


def steps_until_begun(engine: Engine, request: Request, most: int) -> int:
    for step in range(most):
        if request.tokens or request.finished:
            return step
        engine.step()
    return most


@pytest.mark.parametrize("token_budget", [4, 30, 32])
def test_a_prefix_runs_beside_sequences_that_decode(small: GPT, token_budget: int) -> None:
    """It exceeds what they leave of the budget, even where that is nothing."""
    engine = Engine(small, cache=cache_for(small, 200, 4), max_sequences=4, token_budget=token_budget)
    running = [engine.submit([5 + n], SamplingParams(max_tokens=60)) for n in range(3)]
    engine.step()
    request = engine.submit(LONG, SamplingParams(max_tokens=3), bidirectional_prefix=len(LONG))
    assert steps_until_begun(engine, request, 20) <= 2
    before = [len(one.tokens) for one in running]
    engine.step()
    assert [len(one.tokens) for one in running] == [n + 1 for n in before]


def test_younger_requests_do_not_pass_a_prefix_without_end(small: GPT) -> None:
    engine = Engine(small, cache=cache_for(small, 400, 4), max_sequences=6, token_budget=24)
    engine.submit([5], SamplingParams(max_tokens=90))
    engine.step()
    request = engine.submit(LONG, SamplingParams(max_tokens=3), bidirectional_prefix=len(LONG))
    steps = 0
    while not request.tokens and steps < 40:
        engine.submit(LONG[:20], SamplingParams(max_tokens=1))
        engine.step()
        steps += 1
    assert steps <= 3


def test_a_prefix_does_not_wait_for_an_older_verifier_that_replaces(small: GPT) -> None:
    """Several tokens that it puts there in every step are no chunk of a prompt."""

    def verifier(draft: Draft) -> Verdict:
        return Accept() if draft.finished else Replace(len(draft.tokens) - 1, [5, 6])

    engine = Engine(small, cache=cache_for(small, 200, 4), max_sequences=4, token_budget=30)
    engine.submit([5], SamplingParams(max_tokens=60), verifier=verifier)
    engine.step()
    request = engine.submit(LONG, SamplingParams(max_tokens=3), bidirectional_prefix=len(LONG))
    assert steps_until_begun(engine, request, 20) <= 2


def test_a_step_that_exceeds_its_budget_has_no_other_chunk(small: GPT) -> None:
    engine = Engine(small, cache=cache_for(small, 400, 4), max_sequences=4, token_budget=8)
    requests = [engine.submit([4, 5, 6, 7], SamplingParams(max_tokens=9))]
    for n in range(2):
        requests.append(engine.submit([n, *LONG], SamplingParams(max_tokens=2), bidirectional_prefix=1 + len(LONG)))
    computed = []
    while not all(request.finished for request in requests):
        before = engine.stats().tokens_computed
        engine.step()
        computed.append(engine.stats().tokens_computed - before)
    assert computed[:4] == [4, 1 + 31, 2 + 31, 2]


@pytest.mark.parametrize("several", [{"n": 3, "temperature": 1.0, "seed": 1}, {"beam_width": 3}])
def test_samples_to_come_count_among_the_sequences(small: GPT, several: dict[str, Any]) -> None:
    engine = Engine(small, cache=cache_for(small, 400, 4), max_sequences=6, token_budget=64)
    requests = [engine.submit([5 + n, *LONG], SamplingParams(max_tokens=8, **several)) for n in range(5)]
    most = 0
    while not all(request.finished for request in requests):
        engine.step()
        most = max(most, engine.stats().cache.sequences)
    assert most == 6


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("prefix", [0, 40])
def test_samples_share_their_prompt_after_a_preemption(small: GPT, preemption: str, prefix: int) -> None:
    prompt = [3 + n for n in range(40)]
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=1)

    def run(others: int) -> tuple[list[list[int]], Engine]:
        torch.manual_seed(0)
        engine = Engine(small, cache=cache_for(small, 20, 4), max_sequences=8, preemption=preemption)
        for _ in range(others):
            engine.submit([5] * 4, SamplingParams(max_tokens=40))
        request = engine.submit(prompt, params, bidirectional_prefix=prefix)
        list(engine.stream(request))
        return [output.tokens for output in request.outputs], engine

    alone, _ = run(0)
    beside, engine = run(1)
    assert beside == alone and engine.stats().preemptions > 0
    engine.cache.check()
