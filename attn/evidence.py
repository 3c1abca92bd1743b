"""What was measured on cards, as data of the package: which backends passed their tests there, and how fast each one is.

evidence.json is made from the committed results of `make gpu` and holds, for each card, the backends whose tests failed
and, for each class of shapes, every backend's time as a multiple of the fastest one's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from .call import Call
from .paged.call import AppendCall, PagedCall

FILE = Path(__file__).with_name("evidence.json")
HEAD_DIMS = (64, 128, 256)  # a class holds what is at most so wide
SHORT = 1024  # queries of a sequence
SMALL = 4 * 2**20  # bytes: what a card reads and writes in about the time of a launch


@cache
def cards() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text())


def shape_class(kind: str, terms: bool, bits: int, head_dim: int, queries: int) -> str:
    """kind: forward, backward or paged; `terms`: a score is more than <q, k>, or dropout follows it."""
    rows = "one" if queries == 1 else "short" if queries <= SHORT else "long"
    return f"{kind}, {'terms' if terms else 'plain'}, {bits} bit, {_width(head_dim)}, {rows}"


def moving_class(kind: str, bits: int, head_dim: int, size: int) -> str:
    """kind: append, merge or copy, which only move numbers; size: bytes of what they are given."""
    return f"{kind}, {bits} bit, {_width(head_dim)}, {'small' if size <= SMALL else 'large'}"


def _width(head_dim: int) -> str:
    return f"head_dim {next((n for n in HEAD_DIMS if head_dim <= n), head_dim)}"


def class_of(call: Call, kind: str) -> str:
    terms = _has_terms(call) or call.dropout_p > 0
    return shape_class(kind, terms, _bits(call.q), call.q.shape[-1], call.max_seqlen_q)


def class_of_paged(call: PagedCall) -> str:
    return shape_class("paged", _has_terms(call), _bits(call.k_pages), call.q.shape[-1], call.max_seqlen_q)


def class_of_decoding(k_pages: Tensor) -> str:
    """Of one query a sequence, with nothing but <q, k> in a score."""
    return shape_class("paged", False, _bits(k_pages), k_pages.shape[-1], 1)


def class_of_append(call: AppendCall) -> str:
    return moving_class("append", _bits(call.k_pages), call.k.shape[-1], call.k.nbytes + call.v.nbytes)


def class_of_merge(outs: Sequence[Tensor]) -> str:
    return moving_class("merge", _bits(outs[0]), outs[0].shape[-1], sum(out.nbytes for out in outs))


def class_of_copy(k_pages: Tensor, v_pages: Tensor, src: Tensor) -> str:
    page = (k_pages.nbytes + v_pages.nbytes) // max(len(k_pages), 1)
    return moving_class("copy", _bits(k_pages), k_pages.shape[-1], len(src) * page)


def _has_terms(call: Call | PagedCall) -> bool:
    terms = (call.bias, call.distance_bias, call.alibi_slopes, call.row_distance_bias, call.col_distance_bias)
    return call.softcap > 0 or any(term is not None for term in terms)


def _bits(x: Tensor) -> int:
    return 8 * x.element_size()


@cache
def failing(card: str) -> tuple[str, ...]:
    """The backends that failed tests on the card."""
    return tuple(cards().get(card, {}).get("failing", ()))


@cache
def order(card: str, shape: str) -> tuple[str, ...]:
    """Backends from the fastest on, those that failed tests on the card last; empty where nothing of it was measured."""
    times = cards().get(card, {}).get("times", {}).get(shape, {})
    return tuple(sorted(times, key=lambda name: (name in failing(card), times[name])))


def in_words(card: str, shape: str) -> str:
    """On what grounds backends are ordered for such a call."""
    found = cards().get(card)
    if found is None:
        return f"nothing was measured on {card}: the portable path comes first"
    ranked = order(card, shape)
    if not ranked:
        last = f", what fails tests there ({', '.join(failing(card))}) last" if failing(card) else ""
        return f"nothing like it was measured on {card} ({shape}): the portable path comes first{last}"
    times = found["times"][shape]
    told = ", ".join(f"{name} {times[name]:.2f}" + " (fails tests)" * (name in failing(card)) for name in ranked)
    return f"measured on {card} ({shape}), time over the fastest: {told}"
