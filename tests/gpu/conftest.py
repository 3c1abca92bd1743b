"""What a card must prove, written once: on its backends at the sizes that matter, and small on the CPU's in every test run."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..lanes import GPU_LANES, Lane, missing
from .devices import has_card

SMALL = [Lane("cpu"), Lane("triton")]  # C++, and Triton interpreted
CARD = [lane for lane in GPU_LANES if lane.backend != "reference"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = any("card" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "card" in metafunc.fixturenames and not own:
        lanes = [*SMALL, *(pytest.param(lane, marks=pytest.mark.gpu) for lane in CARD)]
        metafunc.parametrize("card", lanes, ids=str, indirect=True)


@pytest.fixture
def card(request: pytest.FixtureRequest) -> Iterator[Lane]:
    lane: Lane = request.param
    if reason := missing(lane):
        pytest.skip(f"{lane}: {reason}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lane
    torch.set_num_threads(threads)


@pytest.fixture
def gigabytes(card: Lane) -> Iterator[None]:
    """One test of all processes at a time has gigabytes of the card, and leaves none of them with its process."""
    if not has_card(card):
        yield
        return
    with (Path(tempfile.gettempdir()) / "duplex_attn_gigabytes").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()
