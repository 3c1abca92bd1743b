"""A transformers model before and after `duplex_attn.swap`, and over pages, as a workload: a decoder generates, an encoder encodes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..integrations.directory import load
from ..text import Tokens
from .workloads import CHECKED_LINES, Settings, Workload, spread, tokenised

PAGE_SIZE = 16
MakeCache = Callable[[int], dict[str, Any]]


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
    make, refusal = paged(swapped, left)
    pages = len(tokens.ids) * -(-(tokens.ids.shape[1] + new) // PAGE_SIZE)

    def run(of: Any, cached: MakeCache | None = None) -> Callable[[], object]:
        if generates:
            length = {"max_new_tokens": new, "min_new_tokens": new}

            def text() -> object:
                cache = {} if cached is None else cached(pages)
                return of.generate(**batch, **length, do_sample=False, pad_token_id=0, **cache)

            return torch.inference_mode()(text)
        return torch.inference_mode()(lambda: of(**batch))

    @torch.inference_mode()
    def outputs(of: Any, lines: Tokens, cached: MakeCache | None = None) -> Tensor:
        given = inputs(lines, settings.device, cached is not None)
        if config.is_encoder_decoder:
            return of(**given, decoder_input_ids=given["input_ids"][:, :1])[0]
        if cached is not None:
            given |= {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0), **cached(pages)}
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
    systems: dict[str, tuple[str, Any, MakeCache | None]] = {
        "before": ("before", model, None),
        "after": ("after swap", swapped, None),
    }
    if make is not None:
        systems["paged"] = "over pages", swapped, make
    workload = Workload(
        name=f"{type(model).__name__}{'.generate' if generates else ''}",
        detail=f"{directory.resolve().name}, {count}" + (f", {new} new tokens each" if generates else ""),
        tokens=len(tokens.ids) * new if generates else tokens.total,
        systems={key: name for key, (name, _, _) in systems.items()},
        runs={key: run(of, cached) for key, (_, of, cached) in systems.items()},
        checked={key: partial(outputs, of, few, cached) for key, (_, of, cached) in systems.items()},
        exact=exact,
    )
    notes = [f"before: attn_implementation={before!r}", *(f"swap: {x}" for x in str(report).splitlines())]
    return workload, notes + [f"not over pages: {refusal}"] * bool(refusal)


def paged(model: Any, decoder: bool) -> tuple[MakeCache | None, str]:
    """What makes the argument of a paged cache of so many pages for a decoder, or why there is none."""
    if not decoder:
        return None, ""
    from ..integrations.paged_cache import PagedCache
    from ..integrations.paged_model import PagedModel

    try:
        served = PagedModel(model)
    except ValueError as error:
        return None, str(error)
    return lambda pages: {served.cache_argument: PagedCache(served, pages, PAGE_SIZE)}, ""


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
