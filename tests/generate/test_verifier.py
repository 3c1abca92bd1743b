"""Checked generation: what a verifier takes back was never shown, and the cache is truncated, not computed again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn.generate import Accept, Draft, Engine, Reject, Replace, SamplingParams, Verdict, Wait
from duplex_attn.generate import engine as module
from duplex_attn.modules import GPT

from .conftest import PROMPTS, MakeEngine

PARAMS = SamplingParams(max_tokens=12)


def greedy(model: GPT, tokens: list[int], count: int, banned: dict[int, set[int]]) -> list[int]:
    """Tokens by the model from scratch, without those banned at a place."""
    made: list[int] = []
    for place in range(count):
        logits = model(torch.tensor([tokens + made]))[0, -1]
        logits[list(banned.get(place, ()))] = float("-inf")
        made.append(int(logits.argmax()))
    return made


def run(engine: Engine, verifier: Any, params: SamplingParams = PARAMS, **options: Any) -> tuple[list[int], list[int]]:
    """Tokens in the end, and those that the stream showed."""
    request = engine.submit(PROMPTS[0], params, verifier=verifier, **options)
    shown = [token for chunk in engine.stream(request) for token in chunk.tokens]
    return request.tokens, shown


@pytest.mark.parametrize("verdict", [Accept(), Wait()])
def test_nothing_taken_back(small: GPT, engine: MakeEngine, verdict: Verdict) -> None:
    tokens, shown = run(engine(), lambda draft: verdict)
    assert tokens == shown == greedy(small, PROMPTS[0], 12, {})


def test_what_is_undecided_is_not_shown(engine: MakeEngine) -> None:
    one = engine()
    request = one.submit(PROMPTS[0], PARAMS, verifier=lambda draft: Accept() if len(draft.tokens) % 5 == 0 else Wait())
    sizes = [len(chunk.tokens) for chunk in one.stream(request)]
    assert sizes == [5, 5, 2]
    undecided = one.submit(PROMPTS[0], PARAMS, verifier=lambda draft: Wait())
    one.step()
    one.step()
    one.cancel(undecided)
    assert [(c.tokens, c.text) for c in one.stream(undecided)] == [([], "")]


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("prefix", [0, 7, 23])
@pytest.mark.parametrize("to", [0, 2, 5])
def test_reject_bans_what_stood_there(small: GPT, engine: MakeEngine, to: int, prefix: int, speculate: int) -> None:
    """At token 6, twice: another one comes in the place of token `to`, and the rest follows from it."""
    banned: list[int] = []

    def verifier(draft: Draft) -> Verdict:
        if len(draft.tokens) == 6 and len(banned) < 2:
            banned.append(draft.tokens[to])
            return Reject(to)
        return Accept() if len(banned) == 2 else Wait()

    one = engine()
    tokens, shown = run(one, verifier, replace(PARAMS, speculate=speculate), bidirectional_prefix=prefix)
    made: list[int] = []
    for place in range(12):
        logits = small(torch.tensor([PROMPTS[0] + made]), mask=da.prefix_lm(prefix))[0, -1]
        if place == to:
            logits[banned] = float("-inf")
        made.append(int(logits.argmax()))
    assert len(set(banned)) == 2 and tokens == shown == made
    if not speculate and not (prefix == 23 and to == 0):  # a prefix without a token after it is computed anew
        assert one.stats().tokens_computed == 23 + 11 + 2 * (6 - to)


def test_bans_end_with_what_came_before_them(engine: MakeEngine) -> None:
    """Rejected at 3, then at 1: the ban at 3 was of a text that is gone."""
    seen: list[tuple[int, ...]] = []

    def verifier(draft: Draft) -> Verdict:
        seen.append(tuple(draft.tokens))
        if len(draft.tokens) == 4 and len(seen) < 7:
            return Reject(3 if len(seen) == 4 else 1)
        return Wait()

    one = engine()
    request = one.submit(PROMPTS[0], PARAMS, verifier=verifier)
    for _ in one.stream(request):
        assert request.samples[0].banned.keys() <= {1, 3}
    assert request.samples[0].banned.keys() == {1}


@pytest.mark.parametrize("by", [[7], [7, 8, 9], "the words", " Paris"])
@pytest.mark.parametrize("to", [0, 3, 6])
def test_replace_puts_it_there(small: GPT, engine: MakeEngine, by: Any, to: int) -> None:
    def verifier(draft: Draft) -> Verdict:
        return Replace(to, by) if len(draft.tokens) == 6 and draft.accepted == 0 else Wait()

    one = engine()
    tokens, shown = run(one, verifier)
    put = one.tokenizer.encode(by, add_special_tokens=False).ids if isinstance(by, str) else by  # type: ignore[union-attr]
    before = greedy(small, PROMPTS[0], to, {}) + put
    assert tokens == shown == (before + greedy(small, PROMPTS[0] + before, 12, {}))[:12]


def test_replacing_may_end_the_text(engine: MakeEngine) -> None:
    one = engine()
    stop = replace(PARAMS, stop="END", logprobs=0)
    request = one.submit(
        PROMPTS[0], stop, verifier=lambda draft: Replace(2, "xENDx") if len(draft.tokens) == 4 else Wait()
    )
    text = "".join(chunk.text for chunk in one.stream(request))
    assert text == request.text and text.endswith("x") and request.outputs[0].finish_reason == "stop"
    logprobs = request.outputs[0].logprobs
    assert logprobs is not None and [x is None for x in logprobs[:3]] == [False, False, True]


def test_the_end_may_be_rejected(engine: MakeEngine) -> None:
    ended: list[int] = []

    def verifier(draft: Draft) -> Verdict:
        if draft.finished and len(ended) < 3:
            ended.append(draft.tokens[-1])
            return Reject(len(draft.tokens) - 1)
        return Accept()

    tokens, shown = run(engine(), verifier)
    assert tokens == shown and len(tokens) == 12 and len({*ended, tokens[-1]}) == 4


def test_draft_tells_tokens_by_character(engine: MakeEngine) -> None:
    drafts: list[Draft] = []
    one = engine()
    run(one, lambda draft: drafts.append(draft) or Accept())  # type: ignore[func-returns-value]
    last = drafts[-1]
    assert last.finished and last.accepted == 11 and [len(d.tokens) for d in drafts] == list(range(1, 13))
    for at in range(len(last.text)):
        token = last.token_at(at)
        assert (last.ends[token - 1] if token else 0) <= at < last.ends[token]


def test_sampling_goes_on_the_same_with_guesses(engine: MakeEngine) -> None:
    def verifier(draft: Draft) -> Verdict:
        return Reject(len(draft.tokens) - 1) if draft.tokens[-1] % 3 == 0 else Accept()

    params = SamplingParams(max_tokens=40, temperature=1.0, seed=4, n=2)
    found = [
        [
            out.tokens
            for out in engine().generate([PROMPTS[0]], replace(params, speculate=k), verifier=verifier)[0].outputs
        ]
        for k in (0, 4)
    ]
    assert found[0] == found[1] and not any(token % 3 == 0 for tokens in found[0] for token in tokens)


class Wrong(Exception):
    pass


def raises(draft: Draft) -> Verdict:
    raise Wrong("no fact")


FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (raises, Wrong, "no fact"),
    "answers None": (lambda draft: None, TypeError, "verifier: expected an answer of Accept, .* got NoneType"),
    "rejects what is not there": (lambda draft: Reject(1), ValueError, r"verifier: expected a token from .* \(0\) to 0, got 1"),
    "rejects before the start": (lambda draft: Reject(-1), ValueError, "got -1"),
    "rejects what it accepted": (
        lambda draft: Accept() if len(draft.tokens) < 3 else Reject(1),
        ValueError,
        r"verifier: expected a token from the first not accepted \(2\) to 2, got 1",
    ),
    "replaces by nothing": (lambda draft: Replace(0, ""), ValueError, "verifier: expected a replacement of one token"),
    "replaces by ids that are none": (lambda draft: Replace(0, [300]), ValueError, "ids from 0 to 299, got 300"),
    "never takes anything": (lambda draft: Reject(0), (ValueError, RuntimeError), "every token is banned"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_verifier_that_goes_wrong_ends_its_request(engine: MakeEngine, fault: str) -> None:
    verifier, error, message = FAULTS[fault]
    one = engine()
    other = one.submit(PROMPTS[1], SamplingParams(max_tokens=20))
    request = one.submit(PROMPTS[0], PARAMS, verifier=verifier)
    with pytest.raises(error, match=message):
        for _ in one.stream(request):
            pass
    assert request.outputs[0].finish_reason == "error" and request.samples[0].seq is None
    assert [t for c in one.stream(other) for t in c.tokens] == engine().generate([PROMPTS[1]], other.params)[0].tokens


def test_rejections_come_to_an_end(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REJECTIONS", 5)
    one = engine()
    with pytest.raises(RuntimeError, match="verifier: expected an end after 5 rejections"):
        run(one, lambda draft: Reject(0))


def test_a_verifier_takes_no_steps_of_its_engine(engine: MakeEngine) -> None:
    """Its request ends with that error, those beside it go on as if alone."""
    one = engine(40)

    def asks(draft: Draft) -> Verdict:
        one.generate([PROMPTS[1]], SamplingParams(max_tokens=2))
        return Accept()

    request = one.submit(PROMPTS[0], PARAMS, verifier=asks)
    beside = one.submit(PROMPTS[2], PARAMS)
    with pytest.raises(RuntimeError, match="step: expected no other to run"):
        list(one.stream(request))
    list(one.stream(beside))
    assert beside.tokens == engine().generate([PROMPTS[2]], PARAMS)[0].tokens
    one.cache.check()


def test_a_verifier_that_cancels_its_request(engine: MakeEngine) -> None:
    one = engine()

    def cancels(draft: Draft) -> Verdict:
        if len(draft.tokens) == 3:
            one.cancel(request)
        return Accept()

    request = one.submit(PROMPTS[0], PARAMS, verifier=cancels)
    chunks = list(one.stream(request))
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "cancelled"]
    assert all(sample.seq is None for sample in request.samples)
    one.cache.check()


def test_a_replacement_of_no_ids(engine: MakeEngine) -> None:
    one = engine()
    request = one.submit(PROMPTS[0], PARAMS, verifier=lambda draft: Replace(0, [True]))
    with pytest.raises(ValueError, match="verifier: expected a replacement of ids"):
        list(one.stream(request))
