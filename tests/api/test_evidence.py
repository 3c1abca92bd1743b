"""On a card the choice among backends rests on what was measured there, and explain says on what."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn import evidence
from duplex_attn.backends import (
    BACKENDS,
    Backend,
    choose,
    choose_append,
    choose_backward,
    choose_copy,
    choose_merge,
    choose_paged,
    choose_planned,
)
from duplex_attn.call import Call
from duplex_attn.paged.call import AppendCall, PagedCall
from torch._subclasses.fake_tensor import FakeTensorMode

backends = importlib.import_module("duplex_attn.backends")  # the package has a function of this name
CARD = "A Card"
FORWARD = "forward, plain, 16 bit, head_dim 64, short"


class Stub(Backend):
    """Takes everything on CUDA tensors, but the fast one no bias and no float32."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, call: Call) -> str | None:
        return "no bias" if self.name == "fast" and call.bias is not None else None

    def refuses_merge(self, outs: Sequence[torch.Tensor]) -> str | None:
        return self.refuses_paged(outs[0], None)

    def refuses_paged(self, x: torch.Tensor, call: PagedCall | None) -> str | None:
        return self.refuses_device(x)

    def refuses_device(self, x: torch.Tensor) -> str | None:
        return "no float32" if self.name == "fast" and x.dtype == torch.float32 else None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Two contenders beside the reference on a card that need not be there; what is put in here was measured on it."""
    portable, fast, found = Stub("portable"), Stub("fast"), dict[str, Any]()
    monkeypatch.setitem(backends._ORDER, "cuda", (portable, fast, BACKENDS["reference"]))
    monkeypatch.setattr(backends, "_card_name", lambda device: CARD)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(evidence, "cards", lambda: {CARD: found} if found else {})
    cached = (backends._candidates, backends._is_contested, backends._ranked, evidence.order, evidence.failing)
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
    assert choose_backward(call(), "").name == "portable", "nothing was measured of backward"
    assert choose(call(softcap=3.0), "").name == "portable", "nor of a score with terms"
    told = evidence.in_words(CARD, FORWARD)
    assert told == f"measured on A Card ({FORWARD}), time over the fastest: fast 1.00, portable 1.50"
    assert evidence.in_words(CARD, "other") == (
        "nothing like it was measured on A Card (other): the portable path comes first"
    )


def paged(tokens: int, dtype: torch.dtype, softcap: float = 0.0) -> tuple[PagedCall, AppendCall]:
    """Decoding, and the append before it."""
    with FakeTensorMode():
        x = torch.empty(tokens, 2, 64, dtype=dtype, device="cuda")
        pages = torch.empty(9, 16, 2, 64, dtype=dtype, device="cuda")
        given = {"k_pages": pages, "v_pages": pages}
        read = {"q": x, "softcap": softcap, "max_seqlen_q": 1}
        return (
            PagedCall(**dict.fromkeys(PagedCall._fields) | given | read),
            AppendCall(**dict.fromkeys(AppendCall._fields) | given | {"k": x, "v": x}),
        )


def test_calls_that_move_numbers_are_ordered_as_well(measured: dict[str, Any]) -> None:
    kinds = ("append, 16 bit, head_dim 64, {}", "merge, 16 bit, head_dim 64, {}", "copy, 16 bit, head_dim 64, {}")
    fast = {"portable": 1.5, "fast": 1.0}
    times = {kind.format("small"): fast for kind in kinds} | {"paged, plain, 16 bit, head_dim 64, one": fast}
    measured.update(failing=[], times=times)
    # Tokens of 256 bytes in k and as many in v, rows of 256 bytes in each of two parts, pages of 8 KiB in both pools.
    for tokens, pages, dtype, softcap, expected in (
        (8192, 512, torch.bfloat16, 0.0, "fast"),
        (8193, 513, torch.bfloat16, 3.0, "portable"),  # large, and a score with terms: nothing was measured
        (10, 10, torch.float32, 0.0, "portable"),  # measured or not, what refuses it does not run it
    ):
        times |= {kind.replace("16 bit", "32 bit").format("small"): fast for kind in kinds}
        read, new = paged(tokens, dtype, softcap)
        with FakeTensorMode():
            src = torch.empty(pages, dtype=torch.int32, device="cuda")
        assert choose_append(new, "").name == expected
        assert choose_merge([new.k, new.k], "").name == expected
        assert choose_copy(new.k_pages, new.v_pages, src, "").name == expected
        assert choose_paged(read, "").name == expected
        if softcap == 0:
            assert choose_planned(read.k_pages).name == expected, "plans are for what decodes"


def test_a_named_backend_needs_no_evidence(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fast", backends._ORDER["cuda"][1])
    read, new = paged(4, torch.float32)
    for choose_one, refused in ((choose_append, new), (choose_paged, read)):
        with pytest.raises(ValueError, match="no float32"):
            choose_one(refused, "fast")
    read, new = paged(4, torch.bfloat16)
    assert choose_append(new, "fast").name == choose_paged(read, "fast").name == "fast"


def test_what_fails_its_tests_comes_after_what_does_not(measured: dict[str, Any]) -> None:
    measured.update(failing=["fast"], times={FORWARD: {"portable": 1.5, "fast": 1.0}})
    assert choose(call(), "").name == "portable"
    assert evidence.in_words(CARD, FORWARD).endswith("portable 1.50, fast 1.00 (fails tests)")


def test_what_fails_its_tests_comes_last_where_nothing_was_measured(measured: dict[str, Any]) -> None:
    measured.update(failing=["portable"], times={})
    assert choose(call(), "").name == "fast"
    assert choose(call(bias=True), "").name == "portable", "before the reference all the same"
    told = evidence.in_words(CARD, FORWARD)
    assert told.endswith(": the portable path comes first, what fails tests there (portable) last")


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
