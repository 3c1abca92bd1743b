"""The engine's tokens are the model's: of one request or many, in chunks, out of pages, in samples and beams."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.generate import Engine, SamplingParams
from duplex_attn.modules import GPT

from .conftest import CONFIGS, PROMPTS, VOCAB, MakeEngine, seeded

KINDS = {
    "greedy": SamplingParams(max_tokens=12),
    "temperature": SamplingParams(max_tokens=12, temperature=0.9, seed=1),
    "top_k": SamplingParams(max_tokens=12, temperature=1.2, top_k=9, seed=2),
    "top_p": SamplingParams(max_tokens=12, temperature=1.5, top_p=0.8, seed=3),
    "min_p": SamplingParams(max_tokens=12, temperature=2.0, min_p=0.02, seed=4),
    "all of them": SamplingParams(max_tokens=12, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=5),
    "samples": SamplingParams(max_tokens=12, temperature=1.0, seed=6, n=3),
    "beams": SamplingParams(max_tokens=8, beam_width=3, n=3),
    "logprobs": SamplingParams(max_tokens=12, logprobs=2),
    "speculative": SamplingParams(max_tokens=12, temperature=0.7, seed=7, speculate=3),
}


def found(engine: Engine, prompts: list[list[int]], params: Any, **options: Any) -> list[list[list[int]]]:
    """tokens[prompt][sample]"""
    return [[out.tokens for out in r.outputs] for r in engine.generate(prompts, params, **options)]


def test_greedy_tokens_are_those_of_the_model(model: GPT, engine: MakeEngine) -> None:
    tokens = found(engine(model=model), PROMPTS, SamplingParams(max_tokens=20))
    for prompt, (line,) in zip(PROMPTS, tokens, strict=True):
        assert line == model.generate(torch.tensor([prompt]), 20)[0].tolist()


GROUPED = {"num_key_value_heads": 2, "intermediate_size": 70}
GEMMA = {"query_pre_attn_scalar": 20, "head_dim": 12, "sliding_window": 6, "hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED | {"sliding_window": 7}),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED | {"head_dim": 12}),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | GEMMA | {"attn_logit_softcapping": 3.0}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GROUPED | GEMMA),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Any, engine: MakeEngine, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": None}
    kind, options = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    theirs = getattr(transformers, architecture)(getattr(transformers, kind)(**small, **options)).eval()
    theirs.save_pretrained(tmp_path)
    prompts = torch.randint(0, VOCAB, (3, 15))
    expected = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    tokens = found(engine(model=load_checkpoint(tmp_path)), prompts.tolist(), SamplingParams(max_tokens=20))
    assert [line for (line,) in tokens] == expected[:, 15:].tolist()


def test_sampling_follows_the_probabilities(small: GPT, engine: MakeEngine) -> None:
    """The first token of many samples: each as often as the filtered softmax says, none that it leaves out."""
    params = SamplingParams(max_tokens=1, temperature=1.5, top_k=12, top_p=0.9, min_p=0.03, seed=0)
    logits = small(torch.tensor([PROMPTS[0]]))[0, -1].double() / params.temperature
    best, ids = logits.topk(params.top_k)
    share = best.softmax(-1)
    share = share * (share.cumsum(-1) - share < params.top_p)
    share = share * (share >= params.min_p * share.max())
    share /= share.sum()
    counts: dict[int, int] = dict.fromkeys(ids.tolist(), 0)
    one = engine(max_sequences=500)
    for start in range(0, 2000, 500):
        for out in one.generate([PROMPTS[0]], replace(params, n=500, seed=start))[0].outputs:
            counts[out.tokens[0]] += 1
    assert 3 <= int((share > 0).sum()) < params.top_k
    for token, expected in zip(ids.tolist(), share.tolist(), strict=True):
        assert abs(counts[token] / 2000 - expected) <= 4 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_alone_is_among_others(engine: MakeEngine, batch_invariant: bool) -> None:
    """Tokens of every kind of request: by itself, all at once, and coming and going in any order."""
    options = {"batch_invariant": batch_invariant}
    asked = [(PROMPTS[n % len(PROMPTS)], params) for n, params in enumerate(KINDS.values())]
    alone = [found(engine(**options), [prompt], params)[0] for prompt, params in asked]
    together = engine(**options)
    assert found(together, [p for p, _ in asked], [params for _, params in asked]) == alone
    rng = random.Random(0)
    busy = engine(token_budget=16, max_sequences=16, **options)
    waiting, requests = list(range(len(asked))), {}
    rng.shuffle(waiting)
    while waiting or any(not r.finished for r in requests.values()):
        if waiting and rng.random() < 0.5:
            n = waiting.pop()
            requests[n] = busy.submit(*asked[n])
        busy.step()
    for n, expected in enumerate(alone):
        assert [out.tokens for out in requests[n].outputs] == expected


def test_batch_invariant_logprobs_have_the_same_bits(engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=10, logprobs=3)
    alone = [engine(batch_invariant=True).generate([p], params)[0].outputs[0].logprobs for p in PROMPTS]
    busy = engine(batch_invariant=True, token_budget=11, max_sequences=5)
    together = [r.outputs[0].logprobs for r in busy.generate(PROMPTS, params)]
    assert together == alone
    for logprob in itertools.chain.from_iterable(filter(None, alone)):
        assert logprob is not None and len(logprob.top) == 3 and logprob.logprob == max(logprob.top.values())


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
def test_chunked_prefill_is_the_whole(engine: MakeEngine, budget: int) -> None:
    params = SamplingParams(max_tokens=6)
    expected = found(engine(), PROMPTS, params)
    one = engine(token_budget=budget, max_sequences=1)
    assert found(one, PROMPTS, params) == expected
    assert one.stats().steps >= sum(map(len, PROMPTS)) // budget


def test_a_long_prompt_does_not_stall_decoding(engine: MakeEngine) -> None:
    one = engine(token_budget=8, max_sequences=4)
    talking = one.submit(PROMPTS[3], SamplingParams(max_tokens=20))
    while not talking.tokens:
        one.step()
    long = one.submit(PROMPTS[2], SamplingParams(max_tokens=1))
    for n in range(2, 7):
        one.step()
        assert len(talking.tokens) == n and not long.tokens
    one.close()


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_preemption_changes_nothing(engine: MakeEngine, preemption: str, batch_invariant: bool) -> None:
    asked = [(prompt, params) for prompt in PROMPTS for params in KINDS.values()]
    rows = [p for p, _ in asked], [params for _, params in asked]
    expected = found(engine(800, batch_invariant=batch_invariant), *rows)
    tight = engine(40, preemption=preemption, batch_invariant=batch_invariant)
    assert found(tight, *rows) == expected
    assert tight.stats().preemptions >= 3


def test_prefixes_are_reused(engine: MakeEngine) -> None:
    one = engine()
    params = SamplingParams(max_tokens=3)
    expected = found(one, [PROMPTS[2]], params)
    before = one.stats().tokens_computed
    assert found(one, [PROMPTS[2]], params) == expected
    assert one.stats().tokens_computed - before == 4 + 2  # the last page of the prompt, then all but the last token
    assert found(one, [PROMPTS[2]], params, salt="tenant") == expected
    assert one.stats().tokens_computed - before == 6 + 40 + 2


@pytest.mark.parametrize("prefix", [1, 9, 23])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_bidirectional_prefix_is_that_of_the_dense_model(
    model: GPT, engine: MakeEngine, prefix: int, preemption: str
) -> None:
    """Also with a budget that is smaller than the prefix, and out of pages."""
    expected = model.generate(torch.tensor([PROMPTS[0]]), 12, mask=da.prefix_lm(prefix))[0].tolist()
    one = engine(20, model=model, token_budget=5, max_sequences=3, preemption=preemption)
    params = SamplingParams(max_tokens=12)
    requests = [
        one.submit(PROMPTS[0], params, bidirectional_prefix=prefix),
        one.submit(PROMPTS[2], params),
        one.submit(PROMPTS[0], params, bidirectional_prefix=prefix),
    ]
    while one.step():
        pass
    assert requests[0].tokens == requests[2].tokens == expected
    assert requests[1].tokens == model.generate(torch.tensor([PROMPTS[2]]), 12)[0].tolist()


def test_samples_share_the_prompt(engine: MakeEngine) -> None:
    one = engine()
    request = one.submit(PROMPTS[2], SamplingParams(max_tokens=30, temperature=1.0, seed=0, n=8))
    for _ in range(3):
        one.step()
    stats = one.stats()
    assert stats.tokens_computed == 40 + 2 * 8
    assert stats.cache.pages_shared == 10 and stats.cache.pages_used == 10 + 8
    one.cancel(request)
    singles = [
        one.generate([PROMPTS[2]], SamplingParams(max_tokens=5, temperature=1.0, seed=seed))[0].tokens
        for seed in range(5)
    ]
    assert len(set(map(tuple, singles))) > 1


def exhaustive(model: GPT, prompt: list[int], length: int, eos: int, penalty: float) -> list[tuple[float, list[int]]]:
    """Every sequence that ends with eos or at the length, the best first."""
    ended: list[tuple[float, list[int]]] = []
    going: list[tuple[float, list[int]]] = [(0.0, [])]
    for step in range(1, length + 1):
        logits = model(torch.tensor([prompt + tokens for _, tokens in going]))[:, -1]
        fresh = []
        for (total, tokens), row in zip(going, logits.double().log_softmax(-1).tolist(), strict=True):
            for token, value in enumerate(row):
                made = (total + value, [*tokens, token])
                (ended if token == eos or step == length else fresh).append(made)
        going = fresh
    return sorted(((total / len(tokens) ** penalty, tokens) for total, tokens in ended), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_wide_beams_find_the_best_of_all(engine: MakeEngine, penalty: float) -> None:
    tiny = seeded(replace(CONFIGS["learned"], vocab_size=5))
    prompt, eos, length = [1, 2, 3, 4, 0, 1], 3, 4
    expected = exhaustive(tiny, prompt, length, eos, penalty)
    one = engine(2000, model=tiny, text=False, eos=eos, max_sequences=512)
    request = one.generate([prompt], SamplingParams(max_tokens=length, beam_width=125, n=10, length_penalty=penalty))[0]
    for out, (score, tokens) in zip(request.outputs, expected, strict=False):
        assert out.tokens == tokens
        assert out.cumulative_logprob / len(tokens) ** penalty == pytest.approx(score, abs=1e-4)  # type: ignore[operator]
    narrow = one.generate([prompt], SamplingParams(max_tokens=length, beam_width=2, length_penalty=penalty))[0]
    assert any(narrow.tokens == tokens for _, tokens in expected)


def test_max_positions_end_a_text(engine: MakeEngine) -> None:
    request = engine().generate([list(range(120))], SamplingParams(max_tokens=50))[0]
    assert len(request.tokens) == 8 and request.outputs[0].finish_reason == "length"


def test_stop_tokens_and_eos(small: GPT, engine: MakeEngine) -> None:
    free = small.generate(torch.tensor([PROMPTS[0]]), 20)[0].tolist()
    eos = free[4]
    first = free.index(eos) + 1
    one = engine(eos=eos)
    request = one.generate([PROMPTS[0]], SamplingParams(max_tokens=20))[0]
    assert request.tokens == free[:first] and request.outputs[0].finish_reason == "stop"
    assert found(one, [PROMPTS[0]], SamplingParams(max_tokens=20, ignore_eos=True)) == [[free]]
    stopped = SamplingParams(max_tokens=20, ignore_eos=True, stop_tokens=[free[2], 7])
    assert found(one, [PROMPTS[0]], stopped) == [[free[: free.index(free[2]) + 1]]]


class TestSpeculation:
    """A text that repeats itself is guessed well; the tokens are those without guesses."""

    PROMPT = [5, 6, 7, 8, 9, 10, 11, 12] * 3

    @pytest.mark.parametrize("params", [SamplingParams(max_tokens=60), SamplingParams(60, 0.3, seed=1, n=2)], ids=str)
    @pytest.mark.parametrize("batch_invariant", [False, True])
    def test_same_tokens_in_fewer_steps(
        self, engine: MakeEngine, params: SamplingParams, batch_invariant: bool
    ) -> None:
        plain, guessing = (engine(batch_invariant=batch_invariant) for _ in range(2))
        prompts = [self.PROMPT, *PROMPTS]
        expected = found(plain, prompts, params)
        assert found(guessing, prompts, replace(params, speculate=5)) == expected
        stats = guessing.stats()
        assert stats.tokens_guessed > 0 and stats.tokens_generated == plain.stats().tokens_generated
        assert (stats.guesses_right > 0) == (stats.steps < plain.stats().steps)

    def test_out_of_pages_there_are_no_guesses(self, engine: MakeEngine) -> None:
        params = SamplingParams(max_tokens=20, speculate=5)
        assert found(engine(11), [self.PROMPT], params) == found(engine(), [self.PROMPT], replace(params, speculate=0))
