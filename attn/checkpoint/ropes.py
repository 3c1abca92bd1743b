"""The rotary options of a config.json, which every version of transformers writes elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..modules.rope_scaling import RopeScaling
from .family import need


def rope_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of layers that see everything, in one form: rope_theta and partial_rotary_factor None where there are none."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # transformers >= 5, and before
    rope = dict(rope.get("full_attention", rope))
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None:
            rope[name] = raw.get(name)
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return rope | {"original_max_position_embeddings": original or need(raw, "max_position_embeddings")}


def rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Of what `rope_options` found."""
    kind, original = rope["rope_type"], rope["original_max_position_embeddings"]
    if kind == "default":
        return None
    if kind == "longrope":
        return RopeScaling(
            kind,
            rope.get("factor") or max_positions / original,
            original_max_positions=original,
            attention_factor=rope.get("attention_factor"),
            short_factors=tuple(need(rope, "short_factor")),
            long_factors=tuple(need(rope, "long_factor")),
        )
    return RopeScaling(
        kind,
        need(rope, "factor"),
        rope.get("low_freq_factor", 1.0),
        rope.get("high_freq_factor", 4.0),
        original,
        yarn_attention_factor(rope) if kind == "yarn" else None,
        rope.get("beta_fast") or 32.0,
        rope.get("beta_slow") or 1.0,
        rope.get("truncate", True),
    )


def yarn_attention_factor(rope: Mapping[str, Any]) -> float | None:
    """None: the paper's."""
    given, mscale, mscale_all_dim = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (mscale and mscale_all_dim):
        return given
    stretch = math.log(max(rope["factor"], 1.0))
    return (0.1 * mscale * stretch + 1.0) / (0.1 * mscale_all_dim * stretch + 1.0)
