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
from transformers import Cache, DynamicCache, PreTrainedModel

from ..cache import PagedBatch, PagedKVCache
from ..checks import MAX_HEAD_DIM, wrong_type, wrong_value
from ..generate.engine import cache_for
from ..modules.language_model import CacheShape, Opening
from ..modules.paged_rows import PagedRows
from ..modules.rows import Scores
from .pages import CacheOfPages, windowed
from .transformers import swap

TRIED = 7, 5  # tokens of the texts that a model is tried with, in two steps of at most FIRST of each
FIRST = 4
CLOSE = 0.1  # difference of a text's logits, of their spread: more than 16 bits round, less than a wrong place makes


class PagedModel:
    """A causal decoder of transformers, in eval mode, whose attention runs here from then on (`duplex_attn.swap`).

    It is tried with a few tokens: its logits over pages have to be those of its own attention. Raises ValueError
    for a model that has an encoder, another state than keys and values (Mamba), layers of unlike keys, masks that are no
    spans, scores with a bias, attention that asks no interface, or places that do not follow position_ids.
    """

    can_be_invariant = False  # products are the model's own

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            wrong_type("model", "a model of transformers", type(model).__name__)
        name = type(model).__name__
        if model.training:
            wrong_value("model", "eval mode (model.eval())", "training mode")
        if model.config.is_encoder_decoder:
            wrong_value("model", "a decoder alone", f"{name}, which has an encoder")
        if model._is_stateful:
            wrong_value("model", "a state of keys and values alone", f"{name}, which has another")
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" not in accepted:
            wrong_value("model", "one that takes position_ids", name)
        self.model = model
        self.max_length = max_length(model.config.get_text_config())
        self.cache_argument = "cache" if "cache" in accepted else "past_key_values"  # of older versions
        self._picks_rows = "logits_to_keep" in accepted

        device = model.get_input_embeddings().weight.device
        texts = [torch.arange(n, 4 * n, 3, device=device) for n in TRIED]
        with torch.inference_mode():
            expected = [self._logits(ids, torch.arange(len(ids), device=device)) for ids in texts]
            swap(model)
            states = DynamicCache()
            self._logits(texts[0], torch.zeros(1, dtype=torch.int64, device=device), states)
        self.vocab_size = expected[0].shape[1]
        self.cache_shape, self.places = shape_of(states, name)
        hold(self, texts, expected)

    def modules(self) -> Iterable[nn.Module]:
        return self.model.modules()

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
        if ids.shape != batch.positions.shape:
            wrong_value("ids", f"the batch's {len(batch.positions)} new tokens", tuple(ids.shape))
        if self.max_length is not None and batch.max_seqlen_k > self.max_length:
            wrong_value("ids", f"at most {self.max_length} tokens", batch.max_seqlen_k)
        if rows is None:
            if not all(batch.new_tokens):
                wrong_value("rows", "the rows wanted, where a sequence has no new token", None)
            rows = (batch.cu_seqlens_q[1:] - 1).clamp(min=0)
        return self.run(ids, cache, batch, rows)[0]

    @torch.inference_mode()
    def run(self, ids: Tensor, cache: PagedKVCache, batch: PagedBatch, rows: Tensor) -> tuple[Tensor, set[int]]:
        """Logits of rows (n,), and the layers of the cache that were attended to."""
        step = StepCache(PagedRows.of(cache, batch, False), self.places)
        positions = batch.positions.clamp(min=0).long()  # -1: a row of a buffer that no token is in
        return self._logits(ids, rows.long(), step, positions), step.attended

    def _logits(self, ids: Tensor, rows: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        """(n, vocab_size) of rows (n,) of one row of tokens (T,)."""
        options: dict[str, Any] = {} if cache is None else {self.cache_argument: cache}
        if self._picks_rows:
            options["logits_to_keep"] = rows
        if positions is not None:
            options["position_ids"] = positions[None]
        logits = self.model(ids[None], use_cache=cache is not None, return_dict=True, **options).logits[0]
        return logits if self._picks_rows else logits.index_select(0, rows)


class StepCache(CacheOfPages):
    """The cache of one step: it holds nothing before the step's tokens, packed in one row, whose states go into pages."""

    def __init__(self, rows: PagedRows, places: dict[int, int]):
        super().__init__(places)
        self.rows = rows
        self.attended: set[int] = set()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores, sink: Tensor | None
    ) -> Tensor:
        self.attended.add(layer)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self.rows.attend(layer, q, k, v, windowed(scores, mask), sink=sink)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


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


def shape_of(states: DynamicCache, name: str) -> tuple[CacheShape, dict[int, int]]:
    """Of the keys and values that a model of that name made, and where those of its layers lie among them."""
    layers = {at: layer for at, layer in enumerate(states.layers) if layer.is_initialized}
    shapes = {(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers.values()}
    if len(shapes) != 1:
        wrong_value("model", "layers whose keys and values are alike", f"{name} with {sorted(shapes)}")
    ((heads_kv, head_dim, head_dim_v),) = shapes
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        wrong_value("model", f"a head_dim of at most {MAX_HEAD_DIM}", max(head_dim, head_dim_v))
    keys = next(iter(layers.values())).keys
    shape = CacheShape(len(layers), heads_kv, head_dim, head_dim_v, keys.dtype, keys.device)
    return shape, {at: place for place, at in enumerate(layers)}


def hold(model: PagedModel, texts: list[Tensor], expected: list[Tensor]) -> None:
    """Holds the logits of texts in common steps to those of each by itself."""
    name = type(model.model).__name__
    cache = cache_for(model, num_pages=8, page_size=FIRST)
    seqs = [cache.add(ids) for ids in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    for parts in ([ids[:FIRST] for ids in texts], [ids[FIRST:] for ids in texts]):
        counts = [len(part) for part in parts]
        batch = cache.batch(seqs, counts)
        ids = torch.cat(parts)
        logits, attended = model.run(ids, cache, batch, torch.arange(len(ids), device=ids.device))
        if len(attended) < model.cache_shape.layers:
            wrong_value("model", "attention that asks AttentionInterface", f"{name}, whose computes it itself")
        cache.commit_batch(batch)
        for one, part in zip(found, logits.split(counts), strict=True):
            one.append(part)
    for one, wanted in zip(found, expected, strict=True):
        wanted = wanted.double()
        spread = (wanted - wanted.mean(1, keepdim=True)).norm()
        difference = float((torch.cat(one) - wanted).norm() / spread)
        if not difference <= CLOSE:
            wrong_value("model", "the same logits over pages as without", f"{name}, whose differ by {difference:.0%}")
