"""Each wait and fence of the backward kernels is needed: where the machine ignores one, some order of events shows it."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from duplex_attn.call import GRADIENTS
from duplex_attn.ops import attention_backward, attention_forward
from torch import Tensor

from ..cases import Case, Problem, make
from ..lanes import Lane
from ..oracle import assert_accurate
from .library import CARDS, EMULATED, draw, launched, left_out, mbarriers

# All stages come round, several tiles a block, rows of strangers behind queries and keys. The widest has fewer blocks of
# values in flight than of keys: elsewhere the waits for room for keys cover those for values.
CASE = Case("packed_with_tail", ((150, 70), (150, 300)), (2, 1), (128, 128), torch.bfloat16, mask="causal")
WIDEST = dataclasses.replace(CASE, lengths=((150, 30), (150, 200)), heads=(1, 1), head_dims=(256, 256))
DISTANT = dataclasses.replace(CASE, heads=(1, 1), head_dims=(64, 64), distance_radius=60, sink="float32")
SEEDS = 24  # every way that the machine divides what is late
DQ = ["rows_full", "rows_empty", "k_full_0", "k_empty_0", "k_full_1", "k_empty_1", "v_full_0", "v_empty_0"]
DKDV = ["keys_full", "keys_empty", *(f"rows_{of}_{stage}" for stage in range(3) for of in ("full", "empty"))]
FUSED = [*DKDV, *(f"staged_{of}_{warpgroup}" for warpgroup in range(2) for of in ("full", "empty"))]
FENCES = [
    pytest.param("named_sync", 1, id="strangers_cleared"),  # the named barrier of the computing warpgroups
    *(pytest.param(what, 0, id=what) for what in ("proxy_fence", "product_wait", "product_fence", "block_sync")),
]
FUSED_FENCES = [
    *FENCES,
    pytest.param("named_sync", 2, id="scores_shared"),
    *(pytest.param("proxy_fence", n, id=name) for n, name in enumerate(("of_scores", "of_staged", "of_strangers"), 1)),
    pytest.param("warp_sync", 0, id="staged_by_a_warp"),
    *(pytest.param("reduce_wait", n, id=name) for n, name in ((1, "staged_is_read"), (2, "dq_is_added"))),
]


@cache
def forward(case: Case) -> tuple[Problem, list[object], Tensor, Tensor]:
    made = make(case)
    c = made.call
    call = [
        c.q, c.k, c.v, c.cu_seqlens_q, c.cu_seqlens_k, *map(max, case.lengths), None, None, None, None, None, None, 0, False,
        None, c.distance_bias, None, None, None, c.sink, None, 0.0, 0.0, None, False, False,
    ]  # fmt: skip
    draw(0)
    return made, call, *attention_forward(*call, "cuda")


def outcome(case: Case, wanted: tuple[str, ...], seed: int) -> str:
    """Of all three gradients, those of the kernel that sums dq in any order."""
    made, call, out, lse = forward(case)
    exact, plain, floor = made.answers(gradients=True)
    draw(seed, processors=1)
    try:
        mask = [name in wanted for name in GRADIENTS]
        grads = attention_backward(made.dout, made.dlse, out, lse, *call, mask, "cuda")
        got = {f"d{name}": grad for name, grad in zip(GRADIENTS, grads, strict=True) if name in wanted}
        assert_accurate(got, exact, plain, floor)
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""


EACH = pytest.mark.parametrize(("case", "wanted"), [(WIDEST, ("q",)), (CASE, ("k", "v"))], ids=["dq", "dkdv"])


@EACH
@pytest.mark.parametrize("card", CARDS)
def test_nothing_is_left_out(emulated: Lane, card: str, case: Case, wanted: tuple[str, ...]) -> None:
    with EMULATED.on(CARDS[card]):
        assert {outcome(case, wanted, seed) for seed in range(SEEDS)} == {""}


@pytest.mark.parametrize("head_dim", [96, 128])
def test_nothing_is_left_out_of_all_gradients_at_once(emulated: Lane, head_dim: int) -> None:
    case = dataclasses.replace(CASE, head_dims=(head_dim, head_dim))
    forward(case)
    launched()
    assert {outcome(case, ("q", "k", "v"), seed) for seed in range(SEEDS)} == {""}
    assert {"dq", "dkdv"}.isdisjoint(launched())


@EACH
@pytest.mark.parametrize("what", ["copy_wait", "block_sync"])
def test_what_ampere_leaves_out_is_noticed(emulated: Lane, what: str, case: Case, wanted: tuple[str, ...]) -> None:
    forward(case)
    with EMULATED.on(80), left_out(what):
        assert any(outcome(case, wanted, seed) for seed in range(SEEDS))


@pytest.mark.parametrize(
    ("what", "number"),
    [*(pytest.param("mbarrier_wait", n, id=name) for n, name in mbarriers(DQ)), *FENCES],
)
def test_what_dq_leaves_out_is_noticed(emulated: Lane, what: str, number: int) -> None:
    forward(WIDEST)
    with left_out(what, number):
        assert any(outcome(WIDEST, ("q",), seed) for seed in range(SEEDS))


@pytest.mark.parametrize(
    ("what", "number"),
    [*(pytest.param("mbarrier_wait", n, id=name) for n, name in mbarriers(DKDV)), *FENCES],
)
def test_what_dk_and_dv_leave_out_is_noticed(emulated: Lane, what: str, number: int) -> None:
    forward(CASE)
    with left_out(what, number):
        assert any(outcome(CASE, ("k", "v"), seed) for seed in range(SEEDS))


@pytest.mark.parametrize(
    ("card", "what", "number"), [(80, "block_sync", 0), (90, "named_sync", 2), (90, "named_sync", 3)]
)
def test_what_sums_of_distances_leave_out_is_noticed(emulated: Lane, card: int, what: str, number: int) -> None:
    """On Hopper each warpgroup meets alone."""
    with EMULATED.on(card):
        forward(DISTANT)
        assert not any(outcome(DISTANT, ("distance_bias",), seed) for seed in range(SEEDS))
        with left_out(what, number):
            assert any(outcome(DISTANT, ("distance_bias",), seed) for seed in range(SEEDS))


@pytest.mark.parametrize(
    ("what", "number"),
    [*(pytest.param("mbarrier_wait", n, id=name) for n, name in mbarriers(FUSED)), *FUSED_FENCES],
)
def test_what_all_gradients_at_once_leave_out_is_noticed(emulated: Lane, what: str, number: int) -> None:
    forward(CASE)
    with left_out(what, number):
        assert any(outcome(CASE, ("q", "k", "v"), seed) for seed in range(SEEDS))
