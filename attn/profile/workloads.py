"""The work that is profiled: BERT encoding and GPT generation of real text, through three attentions on one model.

A model without a checkpoint has the standard shape and seeded weights: its speed and its rounding are those of a
trained one, its words are not.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..checkpoint import load_checkpoint
from ..modules import GPT, Bert, BertConfig, GPTConfig, KVCache
from ..text import Text, Tokens, batches, load_tokenizer, train_tokenizer

SYSTEMS = {"plain": "plain", "sdpa": "sdpa", "duplex": "duplex-attn"}
CHECKED_LINES = 4  # compared with float64, which is slow and takes twice the memory
DECODED = 2  # of each checked line's last tokens, read through the cache one at a time
SEED = 0

SIZES: dict[str, tuple[BertConfig, GPTConfig]] = {
    "base": (BertConfig.base(), GPTConfig.gpt2()),
    "tiny": (
        BertConfig(vocab_size=1024, hidden=64, layers=2, heads=2, inner=128),
        GPTConfig(vocab_size=1024, hidden=64, layers=2, heads=2, heads_kv=2, head_dim=32, inner=128),
    ),
}
SHAPES = {
    ("bert", "base"): "bert-base",
    ("gpt", "base"): "gpt2-small",
    ("bert", "tiny"): "tiny",
    ("gpt", "tiny"): "tiny",
}


@dataclass(frozen=True)
class Settings:
    text: Text
    device: torch.device
    dtype: torch.dtype
    size: str  # a key of SIZES, for models without a checkpoint
    batch: int  # lines
    max_length: int  # tokens of a line at most
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """`runs[system]` is timed. `checked[system]` gives what is compared with `exact`, the float64 of a few lines."""

    name: str
    detail: str
    tokens: int  # counted for tokens/s, in one run
    systems: dict[str, str]  # what each is called in the table; the last one is ours
    runs: dict[str, Callable[[], object]]
    checked: dict[str, Callable[[], Tensor]]
    exact: Callable[[], Tensor]


def bert_workload(settings: Settings, checkpoint: Path | None) -> Workload:
    """A batch of lines, padded to the longest, to its last hidden states."""
    if checkpoint is None:
        model: Bert = seeded(Bert, SIZES[settings.size][0], settings)
    else:
        model = load_checkpoint(checkpoint, Bert, dtype=settings.dtype, device=settings.device)
    longest = min(settings.max_length, model.config.max_positions)
    tokens = tokenised(settings, checkpoint, model.config.vocab_size, longest)
    ids, seqlens = tokens.ids.to(settings.device), tokens.seqlens.to(settings.device)
    few, lengths = ids[:CHECKED_LINES], seqlens[:CHECKED_LINES]
    few = few[:, : int(lengths.max())]
    kept = torch.arange(few.shape[1], device=settings.device) < lengths[:, None]

    @torch.inference_mode()
    def hidden(of: Bert, attention: str) -> Tensor:
        return of(few, seqlens=lengths, attention=attention)[kept]

    @torch.inference_mode()
    def encode(attention: str) -> Tensor:
        return model(ids, seqlens=seqlens, attention=attention)

    padding = 1 - tokens.total / ids.numel()
    batch = f"{ids.shape[0]} lines of {spread(tokens)} tokens, {padding:.0%} of the padded batch is padding"
    return Workload(
        name="BERT encoding",
        detail=f"{origin('bert-base', settings, checkpoint)}, {batch}",
        tokens=tokens.total,
        systems=SYSTEMS,
        runs={system: partial(encode, system) for system in SYSTEMS},
        checked={system: partial(hidden, model, system) for system in SYSTEMS},
        exact=lambda: hidden(deepcopy(model).double(), "plain"),
    )


def gpt_workload(settings: Settings, checkpoint: Path | None) -> Workload:
    """Greedy generation from a batch of prompts of unequal lengths, through a KV cache; without sdpa where scores are capped."""
    if checkpoint is None:
        model: GPT = seeded(GPT, SIZES[settings.size][1], settings)
    else:
        model = load_checkpoint(checkpoint, GPT, dtype=settings.dtype, device=settings.device)
    new = min(settings.new_tokens, model.max_length // 2)
    longest = min(settings.max_length, model.max_length - new)
    tokens = tokenised(settings, checkpoint, model.config.vocab_size, longest, special=False)
    ids, seqlens = tokens.ids.to(settings.device), tokens.seqlens.to(settings.device)

    # float64 has seen the whole line; the systems read all but its last tokens, then these one by one
    order = seqlens.argsort(descending=True, stable=True)[:CHECKED_LINES]
    few, lengths = ids[order], seqlens[order]
    few = few[:, : int(lengths.max())]
    steps = min(DECODED, int(lengths.min()) - 1)
    last = lengths.long()[:, None] - 1 - torch.arange(steps, -1, -1, device=settings.device)  # (lines, steps + 1)
    lines = torch.arange(len(few), device=settings.device)[:, None]

    @torch.inference_mode()
    def logits(attention: str) -> Tensor:
        cache = KVCache(model.config, len(few), few.shape[1] + steps, settings.dtype, settings.device)
        prompt = few[:, : few.shape[1] - steps]
        out = [model(prompt, lengths - steps, cache=cache, attention=attention, last=True)]
        for step in range(steps):
            token = few[lines, last[:, step + 1 : step + 2]]
            out.append(model(token, cache=cache, attention=attention, last=True))
        return torch.stack(out, 1)  # (lines, steps + 1, vocab_size)

    @torch.inference_mode()
    def exact() -> Tensor:
        return deepcopy(model).double()(few, lengths, attention="plain")[lines, last]

    systems = {system: name for system, name in SYSTEMS.items() if system != "sdpa" or not model.config.softcap}
    prompts = f"{ids.shape[0]} prompts of {spread(tokens)} tokens, {new} new tokens each"
    return Workload(
        name="GPT generation",
        detail=f"{origin('gpt2-small', settings, checkpoint)}, {prompts}",
        tokens=ids.shape[0] * new,
        systems=systems,
        runs={system: partial(model.generate, ids, new, seqlens, attention=system) for system in systems},
        checked={system: partial(logits, system) for system in systems},
        exact=exact,
    )


def seeded(architecture: Callable[[Any], Any], config: Any, settings: Settings) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return architecture(config).eval().to(device=settings.device, dtype=settings.dtype)


def tokenised(
    settings: Settings, checkpoint: Path | None, vocab_size: int, longest: int, special: bool = True
) -> Tokens:
    """One batch of lines, taken at even distances over the whole text."""
    lines = settings.text.lines
    tokenizer: Tokenizer
    tokenizer = train_tokenizer(lines, vocab_size) if checkpoint is None else load_tokenizer(checkpoint)
    count = min(settings.batch, len(lines))
    taken = [lines[index * len(lines) // count] for index in range(count)]
    tokens = next(batches(taken, tokenizer, count, longest, special=special, vocab_size=vocab_size), None)
    if tokens is None:
        raise ValueError(f"text: expected tokens, got none from the lines of {settings.text.name}")
    return tokens


def origin(base: str, settings: Settings, checkpoint: Path | None) -> str:
    """What the model is: a checkpoint's name, or the shape that stands in its place."""
    if checkpoint is not None:
        return checkpoint.resolve().name
    return f"{base if settings.size == 'base' else settings.size} shape with seeded weights"


def spread(tokens: Tokens) -> str:
    shortest, longest = int(tokens.seqlens.min()), int(tokens.seqlens.max())
    return str(longest) if shortest == longest else f"{shortest} to {longest}"
