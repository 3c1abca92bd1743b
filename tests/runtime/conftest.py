from __future__ import annotations

from collections.abc import Iterator

import duplex_attn as da
import pytest


@pytest.fixture
def cache() -> Iterator[da.PagedKVCache]:
    """12 pages of 4 tokens; whatever a test did to it, it is consistent at its end."""
    made = da.PagedKVCache(2, 12, 4, 2, 8)
    yield made
    made.check()
