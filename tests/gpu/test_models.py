"""Whole models on each backend: as exact as the plain formula, in one pass and in steps over pages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from duplex_attn import PagedKVCache, functional
from duplex_attn.generate import Engine, SamplingParams
from duplex_attn.modules import GPT, Bert, BertConfig, GPTConfig, Seq2Seq, Seq2SeqConfig, paged_pairs, paged_rows, rows
from duplex_attn.modules.disentangled import Disentangled
from torch import Tensor, nn

from ..lanes import Lane
from .devices import widest

VOCAB = 97
SEQLENS = (21, 1, 16, 7)
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden": 64, "layers": 2, "heads": 2, "inner": 96}
LLAMA = GPTConfig.llama(**SMALL, heads_kv=1, head_dim=32, max_positions=64)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Bert(BertConfig(**SMALL, max_positions=64)),
    "deberta": lambda: Bert(BertConfig(**SMALL, positions="none", disentangled=Disentangled(16, 8))),
    "llama": lambda: GPT(LLAMA),
    "gemma": lambda: GPT(GPTConfig.llama(**vars(LLAMA) | {"windows": (None, 5), "softcap": 3.0, "head_norms": True})),
    "t5": lambda: Seq2Seq(Seq2SeqConfig.t5(**SMALL, decoder_layers=2, head_dim=32, buckets=8, max_distance=16)),
    "bart": lambda: Seq2Seq(Seq2SeqConfig.bart(**SMALL, decoder_layers=2, head_dim=32)),
}
GENERATING = ("llama", "gemma", "t5", "bart")


def build(name: str) -> nn.Module:
    """In float64, with weights large enough for a wrong key to show."""
    torch.manual_seed(3)
    model = MODELS[name]().eval().double()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randint(3, VOCAB, (len(SEQLENS), max(SEQLENS))).to(device), torch.tensor(SEQLENS).to(device)


def run(model: nn.Module, device: str, attention: str) -> Tensor:
    """Of all tokens that are no padding, one after another."""
    ids, seqlens = batch(device)
    options: dict[str, Any] = {"seqlens": seqlens, "attention": attention}
    if isinstance(model, Seq2Seq):
        return model(ids, ids[:, :9], **options).flatten(0, 1)
    return model(ids, **options)[torch.arange(ids.shape[1], device=device) < seqlens[:, None]]


@pytest.fixture
def forced(card: Lane, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """All attention of models runs on the lane's backend."""
    for module in (functional, rows, paged_rows, paged_pairs):
        for name in ("attention", "varlen_attention", "paged_attention", "paged_append"):
            if call := getattr(module, name, None):
                monkeypatch.setattr(module, name, partial(call, backend=card.backend))
    return card


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_one_pass(forced: Lane, name: str) -> None:
    exact = build(name)
    truth = run(exact, "cpu", "plain")
    model = copy.deepcopy(exact).to(forced.device, widest(forced))
    check(run(model, forced.device, "duplex"), run(model, forced.device, "plain"), truth)


@torch.inference_mode()
@pytest.mark.parametrize("name", GENERATING)
def test_steps_over_pages(forced: Lane, name: str) -> None:
    """Two steps: prompts, and three tokens after each of them."""
    exact = build(name)
    model = copy.deepcopy(exact).to(forced.device, widest(forced))
    assert isinstance(model, (GPT, Seq2Seq))
    ids, _ = batch("cpu")
    prompts = [row[:length].tolist() for row, length in zip(ids, SEQLENS, strict=True)]
    cache, after = pool(model), [5, 9, 4]
    seqs = []
    for prompt in prompts:
        opening = model.opening(prompt, 4)
        seqs.append(cache.add(opening.tokens, opening.bidirectional_prefix))
    found = [step(model, cache, seqs, 1)]
    for seq in seqs:
        cache.extend(seq, after)
    found.append(step(model, cache, seqs, len(after)))
    whole = {"plain": model, "truth": exact}
    sides = {side: torch.cat([continued(one, prompt, after) for prompt in prompts]) for side, one in whole.items()}
    steps = torch.cat((found[0][:, None], found[1].unflatten(0, (len(seqs), -1))), 1).flatten(0, 1)
    check(steps, sides["plain"], sides["truth"])


def pool(model: GPT | Seq2Seq) -> PagedKVCache:
    layers, heads_kv, head_dim, _, dtype, device = model.cache_shape
    return PagedKVCache(layers, 40, 4, heads_kv, head_dim, dtype=dtype, device=device)


def step(model: GPT | Seq2Seq, cache: Any, seqs: list[Any], last: int) -> Tensor:
    """The logits of each sequence's last tokens, after a step over what is new."""
    made = cache.batch(seqs)
    new = [token for seq in seqs for token in seq.tokens[seq.committed :]]
    ends = made.cu_seqlens_q[1:].long()
    wanted = (ends[:, None] - torch.arange(last, 0, -1, device=ends.device)).flatten()
    logits = model.step(torch.tensor(new, device=ends.device), cache, made, wanted)
    cache.commit_batch(made)
    return logits


def continued(model: GPT | Seq2Seq, prompt: list[int], after: list[int]) -> Tensor:
    """The same logits of the plain formula in one pass."""
    device = model.head.weight.device
    if isinstance(model, Seq2Seq):
        targets = torch.tensor([[model.config.start_token, *after]], device=device)
        return model(torch.tensor([prompt], device=device), targets, attention="plain")[0]
    return model(torch.tensor([prompt + after], device=device), attention="plain")[0, len(prompt) - 1 :]


@pytest.mark.parametrize("name", GENERATING)
def test_the_engine(forced: Lane, name: str) -> None:
    """Each token is the likeliest after those before it, or close to it."""
    exact = build(name)
    model = copy.deepcopy(exact).to(forced.device, widest(forced))
    assert isinstance(model, (GPT, Seq2Seq))
    ids, _ = batch("cpu")
    prompts = [row[:length].tolist() for row, length in zip(ids, SEQLENS, strict=True)]
    engine = Engine(model, cache=pool(model), token_budget=64)
    requests = engine.generate(prompts, SamplingParams(max_tokens=4))
    for prompt, request in zip(prompts, requests, strict=True):
        logits = continued(exact, prompt, request.tokens)[:-1]  # type: ignore[arg-type]
        chosen = logits.gather(1, torch.tensor(request.tokens)[:, None]).squeeze(1)
        near = 2e-2 if widest(forced) == torch.bfloat16 else 1e-5
        assert bool((logits.amax(1) - chosen <= near * logits.abs().amax(1)).all())
    engine.cache.check()


@torch.inference_mode()
def test_a_decoder_of_transformers(forced: Lane) -> None:
    """It is tried as it is built; then steps, of which one cuts prompts."""
    pytest.importorskip("tokenizers", reason="transformers needs it", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    from duplex_attn.integrations.paged_model import PagedModel

    torch.manual_seed(3)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 6}
    options = transformers.MistralConfig(**shape, **heads, attn_implementation="eager", initializer_range=0.2)
    exact = transformers.MistralForCausalLM(options).eval().double()
    plain = copy.deepcopy(exact).to(forced.device, widest(forced))
    model = PagedModel(copy.deepcopy(plain))
    ids, _ = batch(forced.device)
    prompts = [row[:length] for row, length in zip(ids, SEQLENS, strict=True)]
    cache = PagedKVCache(2, 40, 4, 1, 32, dtype=model.cache_shape.dtype, device=forced.device)
    seqs, found = [cache.add(prompt) for prompt in prompts], []
    for new in ([13, 1, 5, 7], [8, 0, 11, 0]):
        made = cache.batch(seqs, new)
        parts = [prompt[seq.committed :][:n] for prompt, seq, n in zip(prompts, seqs, new, strict=True)]
        tokens = torch.cat(parts)
        logits = model.step(tokens, cache, made, torch.arange(len(tokens), device=forced.device))
        cache.commit_batch(made)
        found.append(logits.split(new))
    steps = torch.cat([part for text in zip(*found, strict=True) for part in text])
    sides = [torch.cat([one(p[None].to(one.device)).logits[0] for p in prompts]) for one in (plain, exact)]
    check(steps, *sides)


def check(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    ours, theirs = ((x.double().cpu() - truth).abs().max().item() for x in (found, plain))
    assert ours <= 2 * theirs + torch.finfo(found.dtype).eps * (1 + truth.abs().max().item())
