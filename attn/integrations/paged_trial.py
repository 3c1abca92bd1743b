"""Whether a decoder of transformers runs over pages, found out by trying it with a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..checks import MAX_HEAD_DIM, wrong_value
from ..generate.engine import cache_for
from ..modules.language_model import CacheShape
from ..modules.rows import Scores
from .pages import CacheOfPages, PagedStates
from .transformers import swap

if TYPE_CHECKING:
    from .paged_model import PagedModel

TEXTS = 7, 5  # tokens of the texts, in two steps of at most FIRST of each
FIRST = 4
EXACT = 1e-3  # difference of logits in float32, of their spread; 1e-6 is usual
CLOSE = 0.2  # in 16 bits, of half of a text's tokens: others may take another expert, which changes all of their logits
HIDDEN = 1e30  # logits of what a model never says are about -finfo.max
ATTENTION = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # what transformers keeps of it


def check_kind(model: PreTrainedModel, takes_positions: bool) -> None:
    """Refuses models that what follows cannot try."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        wrong_value("model", "a decoder alone", f"{name}, which has an encoder")
    if not takes_positions:
        wrong_value("model", "one that takes position_ids", name)
    if model.get_output_embeddings() is None:
        wrong_value("model", "one that predicts tokens", f"{name}, which has no head for them")
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_temperature_tuning", None):
        # Llama 4: it asks its cache where the row begins, and a row of several texts begins nowhere.
        wrong_value("model", "scores that follow position_ids", f"{name} with attn_temperature_tuning")
    kept = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if kept - ATTENTION:
        wrong_value("model", "a state of keys and values alone", f"{name} with {', '.join(sorted(kept - ATTENTION))}")


def by_itself(paged: PagedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Texts (n,), and the logits (n, vocab_size) that the model's own attention has of each, without a cache."""
    device = next(paged.model.parameters()).device
    vocab_size = paged.model.config.get_text_config(decoder=True).vocab_size
    texts = [torch.arange(n, 4 * n, 3, device=device) % vocab_size for n in TEXTS]
    expected = [paged.logits(ids) for ids in texts]
    if any(logits.isnan().any() for logits in expected):
        wrong_value("model", "logits that are numbers", f"{type(paged.model).__name__}, which has NaN")
    for ids, wanted in zip(texts, expected, strict=True):
        counted = paged.logits(ids, positions=torch.arange(len(ids), device=device))
        if not difference(counted, wanted).median() <= EXACT:
            wrong_value("model", "position_ids that count from 0", f"{type(paged.model).__name__}, whose own do not")
    return texts, expected


@contextmanager
def swapped(model: nn.Module) -> Iterator[None]:
    """The model's attention runs here; where what follows raises, as it did before."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    previous = [part.config._attn_implementation for part in parts]
    try:
        swap(model)
        yield
    except BaseException:
        for part, implementation in zip(parts, previous, strict=True):
            part.set_attn_implementation(implementation)
        raise


class Shapes(CacheOfPages):
    """Notes the keys and values that attention is asked for, of which there are none before."""

    def __init__(self) -> None:
        super().__init__({})
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return PagedStates(key_states, self, layer_idx), PagedStates(value_states, self, layer_idx)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores, sink: Tensor | None
    ) -> Tensor:
        self.states[layer] = key, value
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[3])


def layers_of(paged: PagedModel, ids: Tensor) -> tuple[CacheShape, dict[int, int]]:
    """What a model's keys and values are like, and where those of its layers lie among the layers of the pages."""
    name, seen = type(paged.model).__name__, Shapes()
    paged.logits(ids, positions=torch.arange(len(ids), device=ids.device), cache=seen)
    if not seen.states:
        wrong_value("model", "a cache of keys and values", f"{name}, which keeps none")
    shapes = {
        (key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device) for key, value in seen.states.values()
    }
    if len(shapes) > 1:
        got = ", ".join(sorted(str(tuple(map(str, shape))) for shape in shapes))
        wrong_value(
            "model", "keys that are alike in all layers (heads_kv, head_dims, dtype, device)", f"{name} with {got}"
        )
    ((heads_kv, head_dim, head_dim_v, dtype, device),) = shapes
    if max(head_dim, head_dim_v) > MAX_HEAD_DIM:
        wrong_value("model", f"a head_dim of at most {MAX_HEAD_DIM}", max(head_dim, head_dim_v))
    shape = CacheShape(len(seen.states), heads_kv, head_dim, head_dim_v, dtype, device)
    return shape, {layer: place for place, layer in enumerate(sorted(seen.states))}


def check_logits(paged: PagedModel, texts: list[Tensor], expected: list[Tensor]) -> None:
    """Holds the logits of texts that share steps over pages to those of each by itself."""
    model = paged.model
    cache = cache_for(paged, num_pages=8, page_size=FIRST)
    seqs = [cache.add(ids) for ids in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    for parts in ([ids[:FIRST] for ids in texts], [ids[FIRST:] for ids in texts]):
        counts = [len(part) for part in parts]
        batch = cache.batch(seqs, counts)
        ids = torch.cat(parts)
        logits = paged.step(ids, cache, batch, torch.arange(len(ids), device=ids.device))
        cache.commit_batch(batch)
        for one, part in zip(found, logits.split(counts), strict=True):
            one.append(part)
    exact = paged.cache_shape.dtype == torch.float32
    for one, wanted in zip(found, expected, strict=True):
        rows = difference(torch.cat(one), wanted)
        worst = float(rows.max() if exact else rows.median())
        if not worst <= (EXACT if exact else CLOSE):
            got = f"{type(model).__name__}, whose differ by {worst:.1%}"
            wrong_value("model", "the same logits over pages as without", got)


def difference(found: Tensor, wanted: Tensor) -> Tensor:
    """float64 (n,): how far logits (n, vocab_size) are from those wanted, of these' spread."""
    found, wanted = found.double(), wanted.double()
    said = (wanted.abs() < HIDDEN).all(0)
    found, wanted = found[:, said], wanted[:, said]
    return (found - wanted).norm(dim=1) / (wanted - wanted.mean(1, keepdim=True)).norm(dim=1)
