"""Every configuration that the card's table holds gives the right numbers, not only those that a call happens to meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from duplex_attn.kernels import tuning

from ..cases import BFLOAT16, FLOAT16, FLOAT32, Case
from ..checking import check
from ..lanes import Lane
from .devices import sized

TERMS: dict[str, Any] = {
    "layout": "packed", "mask": "prefix_each", "softcap": 3.0, "distance_radius": 7, "alibi": True, "bias": "full",
    "sink": "float32", "dropout_p": 0.3,
}  # fmt: skip
KINDS = {"forward", "forward_terms", "dq", "dkdv", "dbias", "ddistance"}


def test_all_of_the_table(card: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    if card.backend != "triton":
        pytest.skip("the tables are Triton's")
    asked: set[tuple[str, int, int]] = set()
    real = tuning.config

    def config(kernel: str, table: str, bits: int, head_dim: int) -> tuning.Config:
        asked.add((kernel, bits, head_dim))
        return real(kernel, table, bits, head_dim)

    monkeypatch.setattr(tuning, "config", config)
    length = sized(card, 300, 20)
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)[: sized(card, 3, 2)]:
        for dim in tuning.HEAD_DIMS:
            shared: dict[str, Any] = {"lengths": ((length,), (length,)), "heads": (2, 1), "head_dims": (dim, dim)}
            check(Case(dtype=dtype, mask="causal", **shared), card, gradients=True)
            check(Case(dtype=dtype, **shared, **TERMS), card, gradients=True)
    assert {kind for kind, _, _ in asked} >= KINDS
    table = tuning.table_for(torch.device(card.device))
    inherited = tuning.tables()[tuning.base(table)]
    kinds = {kind for kind, _, _ in asked}
    held = {(kind, int(bits), int(dim)) for kind in kinds for bits, dims in inherited[kind].items() for dim in dims}
    assert asked == held
