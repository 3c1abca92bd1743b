"""Decoders of transformers over a paged cache, for the engine.

    engine = Engine(PagedModel(model), tokenizer.backend_tokenizer)

A step has the new tokens of all sequences in one row, each at its position, and no padding. The model is not rewritten:
what it takes for its cache hands out `PagedStates`, and its attention reads pages.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from ..cache import PagedBatch, PagedKVCache
from ..checks import wrong_type, wrong_value
from ..modules.language_model import Opening
from ..modules.paged_rows import PagedRows, rows_wanted
from ..modules.rows import Scores
from .paged_trial import by_itself, check_kind, check_logits, layers_of, swapped
from .pages import CacheOfPages, over_pages, windowed

CACHE_NAMES = "cache", "past_key_values"  # of forward's argument, since transformers 5.24 and before
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


class PagedModel:
    """A causal decoder of transformers, in eval mode, whose attention runs here from then on (`duplex_attn.swap`).

    It is tried with a few tokens: its logits over pages have to be those of its own attention. Raises ValueError for a model
    that has an encoder, another state than keys and values (Mamba), layers of unlike keys, masks that are no spans, scores
    with a bias, attention that asks no interface, or places that position_ids do not say; such a model is left as it was.
    """

    can_be_invariant = False  # products are the model's own

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            wrong_type("model", "a model of transformers", type(model).__name__)
        if model.training:
            wrong_value("model", "eval mode (model.eval())", "training mode")
        accepted = inspect.signature(model.forward).parameters
        anything = any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values())
        check_kind(model, "position_ids" in accepted or anything)
        self.model = model
        self.cache_argument = next((name for name in CACHE_NAMES if name in accepted), CACHE)
        self._picks_rows = "logits_to_keep" in accepted
        self.max_length = max_length(model.config.get_text_config(decoder=True))

        texts, expected = by_itself(self)
        self.vocab_size = expected[0].shape[1]
        with swapped(model):
            self.cache_shape, self.places = layers_of(self, texts[0])
            check_logits(self, texts, expected)

    def modules(self) -> Iterable[nn.Module]:
        return self.model.modules()

    def layer_numbers(self) -> set[int]:
        """Of the layers that the model has now, as they say which to their cache."""
        numbers = (vars(module).get("layer_idx") for module in self.model.modules())
        return {number for number in numbers if isinstance(number, int)}

    def most_pages(self, page_size: int) -> int | None:
        return None if self.max_length is None else -(-self.max_length // page_size)

    def opening(self, prompt: Sequence[int], page_size: int, bidirectional_prefix: int = 0) -> Opening:
        return Opening(list(prompt), bidirectional_prefix, self.max_length, prompt)

    def step(
        self,
        ids: Tensor,
        cache: PagedKVCache,
        batch: PagedBatch,
        rows: Tensor | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """As of `GPT`, without batch_invariant."""
        if batch_invariant:
            wrong_value("batch_invariant", "False with a model of transformers", True)
        rows = rows_wanted(ids, batch, rows)
        if self.max_length is not None and batch.max_seqlen_k > self.max_length:
            wrong_value("ids", f"at most {self.max_length} tokens", batch.max_seqlen_k)
        positions = batch.positions.clamp(min=0)  # -1: a row of a buffer that no token is in
        return self.logits(ids, rows, positions, StepCache(PagedRows.of(cache, batch, False), self.places))

    @torch.inference_mode()
    def logits(
        self, ids: Tensor, rows: Tensor | None = None, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(n, vocab_size) of rows (n,), or of all, of one row of tokens (T,)."""
        options: dict[str, Any] = {} if cache is None else {self.cache_argument: cache}
        if self._picks_rows and rows is not None:
            options["logits_to_keep"] = rows.long()
        if positions is not None:
            options["position_ids"] = positions[None].long()
        with over_pages(cache is not None):
            logits = self.model(ids[None], use_cache=cache is not None, return_dict=True, **options).logits[0]
        return logits if self._picks_rows or rows is None else logits.index_select(0, rows)


class StepCache(CacheOfPages):
    """The cache of one step: it holds nothing before the step's tokens, packed in one row, whose states go into pages."""

    def __init__(self, rows: PagedRows, places: dict[int, int]):
        super().__init__(places)
        self.rows = rows

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores, sink: Tensor | None
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.rows.attend(layer, q, k, v, windowed(scores, mask), sink=sink)[None]


def max_length(config: Any) -> int | None:
    """Tokens of a sequence at most: what positions there are for or, where the rotation depends on the longest sequence of a
    step, up to where it changes."""
    most = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            original = getattr(config, "original_max_position_embeddings", None) if original is None else original
            most = min((x for x in (original, most) if x is not None), default=None)
    return most
