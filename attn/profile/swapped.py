"""A transformers model before and after `duplex_attn.swap`, as a workload: a decoder generates, an encoder encodes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..integrations.directory import load
from ..text import Tokens
from .workloads import CHECKED_LINES, Settings, Workload, spread, tokenised


def swapped_workload(settings: Settings, directory: Path) -> tuple[Workload, list[str]]:
    """Loads the model (safetensors only) as config.json's `architectures` says; returns what `swap` reported too.

    Raises ValueError where transformers is missing or does not know the model, or nothing in it could be swapped.
    """
    model = load(directory, settings.dtype, settings.device)
    config = model.config
    swapped = shared_copy(model)
    from ..integrations.transformers import swap

    report = swap(swapped)
    if not report.swapped:
        raise ValueError(f"--model: expected attention that can be swapped in {directory}; {report}")

    generates = bool(model.can_generate())
    positions = int(getattr(config, "max_position_embeddings", settings.max_length + settings.new_tokens))
    new = min(settings.new_tokens, positions // 2) if generates else 0
    tokens = tokenised(settings, directory, config.vocab_size, min(settings.max_length, positions - new))
    left = generates and not config.is_encoder_decoder  # generate expects its prompts to end together
    batch = inputs(tokens, settings.device, left)
    few = Tokens(tokens.ids[:CHECKED_LINES], tokens.seqlens[:CHECKED_LINES])

    def run(of: Any) -> Callable[[], object]:
        if generates:
            length = {"max_new_tokens": new, "min_new_tokens": new}
            return torch.inference_mode()(lambda: of.generate(**batch, **length, do_sample=False, pad_token_id=0))
        return torch.inference_mode()(lambda: of(**batch))

    @torch.inference_mode()
    def outputs(of: Any, lines: Tokens) -> Tensor:
        given = inputs(lines, settings.device)
        if config.is_encoder_decoder:
            return of(**given, decoder_input_ids=given["input_ids"][:, :1])[0]
        found = of(**given)[0]  # (B, S, ...), or one row a line
        kept = given["attention_mask"].bool()
        return found[kept] if found.shape[:2] == kept.shape else found

    def exact() -> Tensor:
        """One line at a time, so with no padding and no mask for it."""
        double = deepcopy(model).double()
        double.set_attn_implementation("eager")
        alone = [Tokens(few.ids[i : i + 1, :n], few.seqlens[i : i + 1]) for i, n in enumerate(few.seqlens.tolist())]
        return torch.cat([outputs(double, line) for line in alone])

    before = config._attn_implementation
    count = f"{len(tokens.ids)} lines of {spread(tokens)} tokens"
    workload = Workload(
        name=f"{type(model).__name__}{'.generate' if generates else ''}",
        detail=f"{directory.resolve().name}, {count}" + (f", {new} new tokens each" if generates else ""),
        tokens=len(tokens.ids) * new if generates else tokens.total,
        systems={"before": "before", "after": "after swap"},
        runs={"before": run(model), "after": run(swapped)},
        checked={"before": lambda: outputs(model, few), "after": lambda: outputs(swapped, few)},
        exact=exact,
    )
    return workload, [f"before: attn_implementation={before!r}", *(f"swap: {x}" for x in str(report).splitlines())]


def shared_copy(model: Any) -> Any:
    """A copy with a configuration of its own and the same weights, not copies of them."""
    weights = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(weight): weight for weight in weights})


def inputs(tokens: Tokens, device: torch.device, left: bool = False) -> dict[str, Tensor]:
    """ids and attention_mask (B, S) as transformers models take them, the padding on the left or the right."""
    ids, mask = tokens.ids, tokens.attention_mask
    if left:  # each row turned by its padding
        column = (torch.arange(ids.shape[1]) + tokens.seqlens[:, None]) % ids.shape[1]
        ids, mask = ids.gather(1, column), mask.gather(1, column)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
