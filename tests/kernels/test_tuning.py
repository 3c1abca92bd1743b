"""Tables of configurations: an architecture's, a card's own on top of it, and one that is only tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from duplex_attn.kernels import paged_calls, tuning

OWN = tuning.Config(64, 32, 4, 2, True)


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A (fast) Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuning.adopt("a-fast-card", {"inherits": "sm_90", "forward": {"16": {"128": OWN._asdict()}}})
    yield
    del tuning.tables()["a-fast-card"]
    tuning.adopt("sm_90", tuning.tables()["sm_90"])


def test_a_card_has_its_own_table_and_the_rest_from_its_architecture(own_table: None) -> None:
    table = tuning.table_for(torch.device("cuda", 0))
    assert table == "a-fast-card"
    assert tuning.config("forward", table, 16, 100) == OWN
    assert tuning.config("forward", table, 16, 64) == tuning.config("forward", "sm_90", 16, 64)
    assert tuning.config("dq", table, 32, 256) == tuning.config("dq", "sm_90", 32, 256)


@pytest.mark.parametrize(
    ("capability", "table"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_90"),
        ((12, 0), "sm_86"),
    ],
)
def test_another_card_has_that_of_its_architecture(capability: tuple[int, int], table: str) -> None:
    assert tuning.architecture(*capability) == table


def test_a_small_card_has_what_does_not_fit_from_its_own_table() -> None:
    small, large = (tuning.config("dq", table, 16, 128) for table in ("sm_86", "sm_80"))
    assert small.block_n < large.block_n
    assert tuning.config("forward", "sm_86", 16, 128) == tuning.config("forward", "sm_80", 16, 128)
    assert tuning.base("sm_86") == "sm_80"


def test_a_trial_ends(own_table: None) -> None:
    before = tuning.config("dq", "a-fast-card", 16, 64)
    with tuning.trial("a-fast-card", "dq", 16, 64, OWN):
        assert tuning.config("dq", "a-fast-card", 16, 64) == OWN
        assert tuning.config("forward", "a-fast-card", 16, 128) == OWN
        assert tuning.config("dq", "sm_90", 16, 64) == before
    assert tuning.config("dq", "a-fast-card", 16, 64) == before


def test_what_an_architecture_can_do_its_cards_can(own_table: None) -> None:
    assert tuning.base("a-fast-card") == tuning.base("sm_90") == "sm_90"
    assert tuning.base("a-fast-card") in paged_calls.NATIVE_FLOAT8
