"""What cards have said of the primitives holds the emulated machine; here, that it would be noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .library import compiler
from .primitives import Emulated, card_library, golden, key_of, nvcc


def lanes(machine: Emulated) -> np.ndarray:
    out = np.zeros((128, 4), np.uint32)
    assert machine.call("probe_lanes", 1, 2, np.ones((128, 2), np.float32), out) is None
    return out


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_card_that_says_something_else_is_noticed(tmp_path: Path) -> None:
    answer = lanes(Emulated({}))
    key = key_of("probe_lanes", (1, 2, np.ones((128, 2), np.float32), np.zeros((128, 4), np.uint32)))
    for card, said in (("sm_80", answer), ("sm_90", answer + 1)):
        np.savez(tmp_path / f"{card}.npz", **{key: said})
    cards = golden(tmp_path)
    assert list(cards) == ["sm_80", "sm_90"]
    lanes(Emulated({"sm_80": cards["sm_80"]}))
    with pytest.raises(AssertionError, match="probe_lanes on sm_90"):
        lanes(Emulated(cards))


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("hopper", [False, True])
def test_the_probes_compile_for_cards(hopper: bool) -> None:
    assert card_library(hopper).exists()
