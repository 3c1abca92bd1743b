"""Every configuration that the card's table holds gives the right numbers, not only those that a call happens to meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from duplex_attn.kernels import tuning

from ..cases import BFLOAT16, FLOAT32, Case
from ..checking import check
from ..lanes import Lane
from ..paged import pool
from .conftest import CARD, SMALL
from .devices import sized

TERMS: dict[str, Any] = {
    "layout": "packed", "mask": "prefix_each", "softcap": 3.0, "distance_radius": 7, "alibi": True, "bias": "full",
    "sink": "float32", "dropout_p": 0.3,
}  # fmt: skip
TRITON = [lane for lane in SMALL if lane.backend == "triton"]  # whose tables they are
TRITON += [pytest.param(lane, marks=pytest.mark.gpu) for lane in CARD if lane.backend == "triton"]
KINDS = {  # which kinds of kernels a call meets
    "plain": {"forward", "dq", "dkdv"},
    "terms": {"forward_terms", "dq_terms", "dkdv_terms", "dbias", "ddistance"},
    "decode": {"paged_decode"},
    "prefill": {"paged"},
    "prefill with terms": {"paged_terms"},
}


def run(card: Lane, call: str, dtype: torch.dtype, dim: int) -> None:
    length = sized(card, 300, 20)
    if call in ("plain", "terms"):
        shared: dict[str, Any] = {"lengths": ((length,), (length,)), "heads": (2, 1), "head_dims": (dim, dim)}
        terms = TERMS if call == "terms" else {"mask": "causal"}
        check(Case(dtype=dtype, **shared, **terms), card, gradients=True)
        return
    queries = 1 if call == "decode" else length
    terms = {"distance_radius": 7, "softcap": 3.0, "sink": True} if call == "prefill with terms" else {}
    lengths = ((queries, queries), (length + 40, length))
    pool.make(pool.Case(lengths, (4, 2), (dim, dim), dtype, **terms)).check(card)


@pytest.mark.parametrize("card", TRITON, ids=str, indirect=True)
@pytest.mark.parametrize("dim", tuning.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("call", KINDS)
def test_each_of_the_table(
    card: Lane, call: str, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[str, int, int]] = set()
    real = tuning.config

    def config(kernel: str, table: str, bits: int, head_dim: int) -> tuning.Config:
        asked.add((kernel, bits, head_dim))
        return real(kernel, table, bits, head_dim)

    monkeypatch.setattr(tuning, "config", config)
    run(card, call, dtype, dim)
    assert asked >= {(kind, 8 * dtype.itemsize, dim) for kind in KINDS[call]}


@pytest.mark.parametrize("table", ["sm_80", "sm_90", "interpreter"])
def test_these_calls_meet_every_kind_of_kernel(table: str) -> None:
    held = {kind for kind, entry in tuning.tables()[table].items() if isinstance(entry, dict)}
    assert held == set().union(*KINDS.values())
    for kind in held:
        assert {int(dim) for dims in tuning.tables()[table][kind].values() for dim in dims} == set(tuning.HEAD_DIMS)
