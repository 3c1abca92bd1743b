"""Lanes whose backend has the paged calls."""

import pytest
import torch
from duplex_attn.backends import BACKENDS

from ..lanes import Lane


@pytest.fixture
def lane(lane: Lane) -> Lane:
    if reason := BACKENDS[lane.backend].refuses_paged(torch.empty(0, device=lane.device), None):
        pytest.skip(f"{lane}: {reason}")
    return lane
