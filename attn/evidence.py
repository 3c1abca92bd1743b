"""What was measured on cards, as data of the package: which backends passed their tests there, and how fast each one is.

evidence.json is made from the committed results of `make gpu` and holds, for each card, the backends whose tests failed
and, for each class of shapes, every backend's time as a multiple of the fastest one's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .call import Call
from .paged.call import PagedCall

FILE = Path(__file__).with_name("evidence.json")
HEAD_DIMS = (64, 128, 256)  # a class holds what is at most so wide
SHORT = 1024  # queries of a sequence


@cache
def cards() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text())


def shape_class(kind: str, terms: bool, bits: int, head_dim: int, queries: int) -> str:
    """kind: forward, backward, paged or append; `terms`: a score is more than <q, k>, or dropout follows it."""
    width = next((n for n in HEAD_DIMS if head_dim <= n), head_dim)
    rows = "one" if queries == 1 else "short" if queries <= SHORT else "long"
    return f"{kind}, {'terms' if terms else 'plain'}, {bits} bit, head_dim {width}, {rows}"


def class_of(call: Call, kind: str) -> str:
    terms = (
        call.bias is not None
        or call.distance_bias is not None
        or call.alibi_slopes is not None
        or call.softcap > 0
        or call.dropout_p > 0
    )
    return shape_class(kind, terms, 8 * call.q.element_size(), call.q.shape[-1], call.max_seqlen_q)


def class_of_paged(call: PagedCall) -> str:
    return shape_class("paged", False, 8 * call.k_pages.element_size(), call.q.shape[-1], call.max_seqlen_q)


@cache
def order(card: str, shape: str) -> tuple[str, ...]:
    """Backends from the fastest on, those that failed tests on the card last; empty where nothing of it was measured."""
    found = cards().get(card, {})
    times = found.get("times", {}).get(shape, {})
    return tuple(sorted(times, key=lambda name: (name in found["failing"], times[name])))


def in_words(card: str, shape: str) -> str:
    """On what grounds backends are ordered for such a call."""
    found = cards().get(card)
    if found is None:
        return f"nothing was measured on {card}: the portable path comes first"
    ranked = order(card, shape)
    if not ranked:
        return f"nothing like it was measured on {card} ({shape}): the portable path comes first"
    times = found["times"][shape]
    told = ", ".join(f"{name} {times[name]:.2f}" + " (fails tests)" * (name in found["failing"]) for name in ranked)
    return f"measured on {card} ({shape}), time over the fastest: {told}"
