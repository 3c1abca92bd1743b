"""On a card the choice among backends rests on what was measured there, and explain says on what."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn import evidence
from duplex_attn.backends import BACKENDS, Backend, choose, choose_backward
from duplex_attn.call import Call
from torch._subclasses.fake_tensor import FakeTensorMode

backends = importlib.import_module("duplex_attn.backends")  # the package has a function of this name
CARD = "A Card"
FORWARD = "forward, plain, 16 bit, head_dim 64, short"


class Stub(Backend):
    """Takes everything on CUDA tensors but a bias."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, call: Call) -> str | None:
        return "no bias" if self.name == "fast" and call.bias is not None else None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two contenders beside the reference on a card that need not be there; what is put in here was measured on it."""
    portable, fast, found = Stub("portable"), Stub("fast"), dict[str, Any]()
    monkeypatch.setitem(backends._ORDER, "cuda", (portable, fast, BACKENDS["reference"]))
    monkeypatch.setattr(backends, "_card_name", lambda device: CARD)
    monkeypatch.setattr(evidence, "cards", lambda: {CARD: found} if found else {})
    cached = (backends._candidates, backends._is_contested, backends._ranked, evidence.order)
    for function in cached:
        function.cache_clear()
    yield found
    for function in cached:
        function.cache_clear()


def call(**given: Any) -> Call:
    with FakeTensorMode():
        x = torch.empty(2, 30, 2, 64, dtype=torch.bfloat16, device="cuda")
        if given.get("bias"):
            given["bias"] = torch.empty(1, 1, 30, 30, device="cuda")
        nothing = dict.fromkeys(Call._fields)
        sizes = {"q": x, "k": x, "v": x, "max_seqlen_q": 30, "max_seqlen_k": 30, "softcap": 0.0, "dropout_p": 0.0}
        return Call(**nothing | sizes | given)


def test_without_evidence_the_portable_path_comes_first(measured: dict[str, Any]) -> None:
    assert choose(call(), "").name == "portable"
    assert evidence.in_words(CARD, FORWARD) == "nothing was measured on A Card: the portable path comes first"


def test_the_fastest_of_a_class_comes_first(measured: dict[str, Any]) -> None:
    measured.update(failing=[], times={FORWARD: {"portable": 1.5, "fast": 1.0}})
    assert choose(call(), "").name == "fast"
    assert choose(call(bias=True), "").name == "portable", "what refuses a call does not run it"
    assert choose_backward(call(), "", [True] * 8).name == "portable", "nothing was measured of backward"
    assert choose(call(softcap=3.0), "").name == "portable", "nor of a score with terms"
    told = evidence.in_words(CARD, FORWARD)
    assert told == f"measured on A Card ({FORWARD}), time over the fastest: fast 1.00, portable 1.50"
    assert evidence.in_words(CARD, "other") == (
        "nothing like it was measured on A Card (other): the portable path comes first"
    )


def test_what_fails_its_tests_comes_after_what_does_not(measured: dict[str, Any]) -> None:
    measured.update(failing=["fast"], times={FORWARD: {"portable": 1.5, "fast": 1.0}})
    assert choose(call(), "").name == "portable"
    assert evidence.in_words(CARD, FORWARD).endswith("portable 1.50, fast 1.00 (fails tests)")


def test_what_was_not_measured_keeps_its_place_behind(measured: dict[str, Any]) -> None:
    measured.update(failing=[], times={FORWARD: {"fast": 1.0}})
    ranked = backends._ranked(torch.device("cuda", 0), FORWARD)
    assert [backend.name for backend in ranked] == ["fast", "portable", "reference"]


def test_explain_says_on_what_grounds(measured: dict[str, Any]) -> None:
    explained = backends.explain_call(call(), "")
    assert explained.backend == "portable"
    assert str(explained).splitlines()[1] == "nothing was measured on A Card: the portable path comes first"
    x = torch.randn(1, 2, 1, 8)
    assert da.explain(x, x, x).grounds == "", "on a CPU there is nothing to weigh"


@pytest.mark.parametrize(("queries", "rows"), [(1, "one"), (2, "short"), (1024, "short"), (1025, "long")])
def test_classes(queries: int, rows: str) -> None:
    assert evidence.class_of(call(max_seqlen_q=queries), "forward").endswith(f"head_dim 64, {rows}")
