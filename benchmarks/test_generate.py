"""Generation from many real prompts: the engine against transformers' generate, on the same weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from duplex_attn.checkpoint import from_tensors
from duplex_attn.generate import Engine, SamplingParams, cache_for
from duplex_attn.modules import GPT, GPTConfig, Seq2Seq
from duplex_attn.modules.language_model import LanguageModel
from duplex_attn.profile.timing import Spread, once
from duplex_attn.profile.workloads import SIZES, Settings, tokenised
from duplex_attn.text import default_text
from torch import Tensor, nn

from .bar import OURS, Bar, Bench, faster
from .roof import roof
from .test_model_cache import llama

PROMPTS, LONGEST = 32, 256  # prompts, and tokens of one at most
LIMITS = {"mixed": (16, 256), "equal": (64, 64)}  # new tokens of each
TINY = {"mixed": (2, 8), "equal": (4, 4)}
ROUNDS = 1  # of either side; one takes minutes
CHECKED = 8  # tokens that both must agree on to the last; beyond, a tie of two logits may part them


@dataclass(frozen=True)
class Contest:
    """A kind of model: transformers' of it, ours on the same weights, and how theirs reads prompts."""

    group: str
    peer: Callable[[bool], Any]  # tiny or not, on the CPU
    ours: Callable[[Any], LanguageModel]
    left: bool  # padding of a batch
    targets: dict[str, float]

    def padded(self, prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        rows = [(prompt, [0] * (width - len(prompt))) for prompt in prompts]
        ids = [fill + prompt if self.left else prompt + fill for prompt, fill in rows]
        mask = [fill + [1] * len(prompt) if self.left else [1] * len(prompt) + fill for prompt, fill in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def gpt2(tiny: bool) -> Any:
    """With sdpa, seeded; sharper than it starts, so that no two logits are all but equal."""
    import transformers

    config = SIZES["tiny"][1] if tiny else GPTConfig.gpt2()
    torch.manual_seed(0)
    options = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.inner,
        n_positions=config.max_positions,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        initializer_range=0.05,
    )
    return transformers.GPT2LMHeadModel(options).eval()


def t5(tiny: bool) -> Any:
    """The same of T5 base, or one a step of which costs nothing."""
    import transformers

    base = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
    small = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "vocab_size": SIZES["tiny"][1].vocab_size}
    torch.manual_seed(0)
    options = transformers.T5Config(
        **(small if tiny else base), decoder_start_token_id=0, attn_implementation="sdpa", initializer_factor=1.5
    )
    return transformers.T5ForConditionalGeneration(options).eval()


def reference(kind: type[nn.Module]) -> Callable[[Any], LanguageModel]:
    """The same weights in a model of ours."""
    return lambda theirs: from_tensors(theirs.config.to_dict(), theirs.state_dict(), kind)


def as_it_is(theirs: Any) -> LanguageModel:
    """transformers' own model over pages."""
    from duplex_attn.integrations.paged_model import PagedModel

    return PagedModel(copy.deepcopy(theirs))


CONTESTS = {
    "gpt2": Contest("generate", gpt2, reference(GPT), True, {"mixed": 2.0, "equal": 1.35}),
    "t5": Contest("generate, T5-base", t5, reference(Seq2Seq), False, {"mixed": 1.5, "equal": 1.35}),
    "llama": Contest("generate, a Llama of transformers", llama, as_it_is, True, {"mixed": 1.8, "equal": 1.2}),
}


@pytest.mark.timeout(3600)  # a loaded machine takes minutes for either side
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("kind", CONTESTS)
def test_generate(bench: Bench, kind: str, limits: str) -> None:
    pytest.importorskip("transformers")
    contest = CONTESTS[kind]
    count = 4 if bench.tiny else PROMPTS
    theirs = contest.peer(bench.tiny).to(bench.device)
    model = contest.ours(theirs)
    settings = Settings(default_text(), bench.device, torch.float32, "base", count, LONGEST, 0)
    tokens = tokenised(settings, None, model.vocab_size, LONGEST, special=False)
    prompts = [row[:length].tolist() for row, length in zip(tokens.ids, tokens.seqlens.tolist(), strict=True)]
    low, high = (TINY if bench.tiny else LIMITS)[limits]
    rng = random.Random(0)
    asked = [SamplingParams(max_tokens=rng.randint(low, high)) for _ in prompts]

    def ours() -> list[list[int]]:
        engine = Engine(model, cache=cache_for(model), token_budget=1024)
        return [request.tokens for request in engine.generate(prompts, asked)]

    ids, mask = contest.padded(prompts, bench.device)

    def padded(most: int) -> Tensor:
        """The new tokens: with an encoder, what comes after the start."""
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found = theirs.generate(ids, attention_mask=mask, max_new_tokens=most, **options)
        return found[:, ids.shape[1] if contest.left else 1 :]

    most = max(params.max_tokens for params in asked)
    engine = Engine(model, cache=cache_for(model), token_budget=1024)
    first = engine.generate(prompts, SamplingParams(max_tokens=CHECKED))
    assert [request.tokens for request in first] == padded(CHECKED).tolist()  # in float32, before anything is timed
    seconds: dict[str, list[float]] = {OURS: [], "HF generate": []}
    found: dict[str, Any] = {}

    def timed() -> None:
        seconds[OURS].append(once(lambda: found.update(ours=ours()), bench.device))

    def peers() -> None:
        seconds["HF generate"].append(once(lambda: found.update(theirs=padded(most)), bench.device))

    bench.benchmark.pedantic(timed, setup=peers, rounds=ROUNDS)
    agreed = [first_difference(line, row.tolist()) for line, row in zip(found["ours"], found["theirs"], strict=True)]
    for agreement, line in zip(agreed, found["ours"], strict=True):
        assert agreement >= min(len(line), CHECKED)
    new = sum(params.max_tokens for params in asked)
    measured = Spread.of([theirs / ours for ours, theirs in zip(seconds[OURS], seconds["HF generate"], strict=True)])
    name = f"{count} real prompts, {limits} limits ({low} to {high}), {new} tokens"
    facts = {
        "text": settings.text.name,
        "prompt_tokens": tokens.total,
        "new_tokens": new,
        "tokens_per_second": new / Spread.of(seconds[OURS]).median,
        "peer_tokens_per_second": new / Spread.of(seconds["HF generate"]).median,
        "lines_all_equal": sum(n == len(line) for n, line in zip(agreed, found["ours"], strict=True)),
    }
    spreads = {side: Spread.of(taken) for side, taken in seconds.items()}
    target = faster(contest.targets[limits])
    bench.keep(Bar(contest.group, name, target, measured, spreads, roof=roof(bench.device, bench.tiny), facts=facts))


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Leading tokens that are the same; theirs may be longer."""
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
