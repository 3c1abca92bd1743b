from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..lanes import Lane, missing
from .library import CARDS, EMULATED


@pytest.fixture(params=[*CARDS, pytest.param("card", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Iterator[Lane]:
    """The CUDA kernels emulated, on a card of each generation that has its own, and, where there is one, on a card."""
    if request.param in CARDS:
        lane: Lane = request.getfixturevalue("emulated")
        with EMULATED.on(CARDS[request.param]):
            yield lane
        return
    lane = Lane("cuda", device="cuda")
    if reason := missing(lane):
        pytest.skip(f"{lane}: {reason}")
    yield lane
