"""Which tokens are left to draw from, and that one row knows nothing of another."""

from __future__ import annotations

import pytest
import torch
from duplex_attn.generate import SamplingParams
from duplex_attn.generate.sampling import NO_TOKEN, Draw, choose, kept, uniform

VOCAB = 1000
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1e-30),
    SamplingParams(temperature=1.3, top_k=1),
    SamplingParams(temperature=1.3, top_k=40),
    SamplingParams(temperature=1.3, top_k=5000),
    SamplingParams(temperature=1.3, top_p=1e-9),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=100.0, top_p=0.999),
    SamplingParams(temperature=1.3, min_p=1.0),
    SamplingParams(temperature=1.3, top_k=100, top_p=0.8, min_p=0.05),
]


def draws() -> list[Draw]:
    return [Draw(params, uniform(n), {n} if n % 2 else ()) for n, params in enumerate(KINDS)]


def test_no_row_knows_of_another() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(KINDS), VOCAB)
    given = logits.clone()
    together = choose(logits, draws())
    assert logits.equal(given)
    assert together == [choose(row[None], [draw])[0] for row, draw in zip(logits, draws(), strict=True)]
    backwards = choose(logits.flip(0), draws()[::-1])
    assert together == backwards[::-1]
    assert together[0] == logits[0].argmax() and together[9] != 9


@pytest.mark.parametrize("warped", ["top_k", "top_p", "min_p"])
def test_what_is_kept_is_what_transformers_keeps(warped: str) -> None:
    warpers = pytest.importorskip("transformers").generation.logits_process
    torch.manual_seed(1)
    logits = 3 * torch.randn(20, VOCAB)
    value = {"top_k": 30, "top_p": 0.85, "min_p": 0.04}[warped]
    kind = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}[warped]
    scores = warpers.TemperatureLogitsWarper(1.2)(None, logits)
    expected = getattr(warpers, kind)(value)(None, scores).softmax(-1)
    found = kept(logits, [SamplingParams(temperature=1.2, **{warped: value})] * 20)  # type: ignore[arg-type]
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)
    assert found.gt(0).equal(expected.gt(0))


def test_equal_probabilities_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for params in (SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.6)):
        assert kept(logits, [params])[0].gt(0).tolist() == [True, True, True, True, False]


def test_a_wide_nucleus_is_found_too() -> None:
    logits = torch.zeros(1, VOCAB).index_fill(1, torch.arange(600, VOCAB), -20.0)
    logits += torch.linspace(0, 0.001, VOCAB)
    assert int(kept(logits, [SamplingParams(temperature=1.0, top_p=0.9)]).gt(0).sum()) == 540


@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "all banned"])
def test_logits_that_are_no_numbers(params: SamplingParams, wrong: float | str) -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, 50)
    if isinstance(wrong, float):
        logits[1, 7] = wrong
    banned = range(50) if wrong == "all banned" else ()
    tokens = choose(logits, [Draw(params, 0.5), Draw(params, 0.5, banned)])
    assert tokens[0] != NO_TOKEN and tokens[1] == NO_TOKEN


def test_numbers_are_uniform_and_their_own() -> None:
    drawn = [uniform(seed, n, place) for seed in range(20) for n in range(5) for place in range(100)]
    numbers = torch.tensor(drawn, dtype=torch.float64)
    assert len(set(drawn)) == len(drawn) and min(drawn) >= 0 and max(drawn) < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert (counts - 500).abs().max() < 5 * 500**0.5
    assert uniform(2**64 - 1, 3) == uniform(2**64 - 1, 3) != uniform(2**64 - 1, 4)
