from __future__ import annotations

import pytest

from ..lanes import Lane, missing


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def hopper(request: pytest.FixtureRequest) -> Lane:
    """The same kernels emulated and, where there is one, on a card."""
    if request.param == "emulated":
        lane: Lane = request.getfixturevalue("emulated")
        return lane
    lane = Lane("cuda", device="cuda")
    if reason := missing(lane):
        pytest.skip(f"{lane}: {reason}")
    return lane
