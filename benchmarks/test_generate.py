"""Generation from many real prompts: the engine against transformers' generate, on the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from duplex_attn.checkpoint import assemble
from duplex_attn.families import FAMILIES, GPT2
from duplex_attn.generate import Engine, SamplingParams, cache_for
from duplex_attn.modules import GPT, GPTConfig
from duplex_attn.profile.timing import Spread, once
from duplex_attn.profile.workloads import SIZES, Settings, tokenised
from duplex_attn.text import default_text
from torch import Tensor

from .bar import OURS, Bar, Bench, faster
from .roof import roof

PROMPTS, LONGEST = 32, 256  # prompts, and tokens of one at most
LIMITS = {"mixed": (16, 256), "equal": (64, 64)}  # new tokens of each
TINY = {"mixed": (2, 8), "equal": (4, 4)}
TARGETS = {"mixed": 2.0, "equal": 1.35}
ROUNDS = 1  # of either side; one takes minutes
CHECKED = 8  # tokens that both must agree on to the last; beyond, a tie of two logits may part them


@pytest.mark.timeout(3600)  # a loaded machine takes minutes for either side
@pytest.mark.parametrize("limits", LIMITS)
def test_generate(bench: Bench, limits: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = SIZES["tiny"][1] if bench.tiny else GPTConfig.gpt2()
    count = 4 if bench.tiny else PROMPTS
    theirs = peer_of(config, transformers).to(bench.device)
    model = gpt_of(theirs, config)
    settings = Settings(default_text(), bench.device, torch.float32, "base", count, LONGEST, 0)
    tokens = tokenised(settings, None, config.vocab_size, LONGEST, special=False)
    prompts = [row[:length].tolist() for row, length in zip(tokens.ids, tokens.seqlens.tolist(), strict=True)]
    low, high = (TINY if bench.tiny else LIMITS)[limits]
    rng = random.Random(0)
    asked = [SamplingParams(max_tokens=rng.randint(low, high)) for _ in prompts]

    def ours() -> list[list[int]]:
        engine = Engine(model, cache=cache_for(model), token_budget=1024)
        return [request.tokens for request in engine.generate(prompts, asked)]

    left, mask = left_padded(prompts, bench.device)

    def padded() -> Tensor:
        most = max(params.max_tokens for params in asked)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return theirs.generate(left, attention_mask=mask, max_new_tokens=most, **options)[:, left.shape[1] :]

    check(model, prompts, left, mask, theirs)
    seconds: dict[str, list[float]] = {OURS: [], "HF generate": []}
    found: dict[str, Any] = {}

    def timed() -> None:
        seconds[OURS].append(once(lambda: found.update(ours=ours()), bench.device))

    def peers() -> None:
        seconds["HF generate"].append(once(lambda: found.update(theirs=padded()), bench.device))

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
    target = faster(TARGETS[limits])
    bench.keep(Bar("generate", name, target, measured, spreads, roof=roof(bench.device, bench.tiny), facts=facts))


def check(model: GPT, prompts: list[list[int]], left: Tensor, mask: Tensor, theirs: Any) -> None:
    """The same greedy tokens of both, in float32, before anything is timed."""
    engine = Engine(model, cache=cache_for(model), token_budget=1024)
    ours = [request.tokens for request in engine.generate(prompts, SamplingParams(max_tokens=CHECKED))]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(left, attention_mask=mask, max_new_tokens=CHECKED, **options)[:, left.shape[1] :]
    assert ours == expected.tolist()


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Leading tokens that are the same; theirs may be longer."""
    return next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def peer_of(config: GPTConfig, transformers: Any) -> Any:
    """GPT-2 of transformers with sdpa, seeded; sharper than it starts, so that no two logits are all but equal."""
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


def gpt_of(theirs: Any, config: GPTConfig) -> GPT:
    """Our decoder with the weights of theirs."""
    with torch.device("meta"):
        model = GPT(config)
    prefix = FAMILIES["gpt2"].prefix
    stored = {name.removeprefix(prefix): tensor for name, tensor in theirs.state_dict().items()}
    model.load_state_dict(assemble(model.state_dict(), stored, GPT2, True, Path("GPT2LMHeadModel")), assign=True)
    model.tie_weights()
    return model.eval()
