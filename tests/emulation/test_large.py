"""The CUDA kernels, emulated, where indices pass 2^31 elements: the tests of the CPU's backends on what these take."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import pytest

from ..contracts import test_large as large
from ..contracts.test_large import FarStorage, normal, same
from ..lanes import Lane
from ..oracle import Call
from .library import CARDS, EMULATED, draw

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address space without memory is had from Linux here")
OWN_LANE = True  # tests that are taken from elsewhere run on it alone


@pytest.fixture(params=CARDS)
def lane(request: pytest.FixtureRequest, emulated: Lane) -> Iterator[Lane]:
    draw(0, processors=3)
    with EMULATED.on(CARDS[request.param]):
        yield emulated


@pytest.mark.parametrize(("radius", "deterministic"), [(None, True), (3, True), (None, False)])
@pytest.mark.parametrize("dim", ["batch", "row", "head"])
def test_dense_strides(lane: Lane, dim: str, radius: int | None, deterministic: bool) -> None:
    """q, k, v and the gradient of out, each stretched along one dimension: outputs and gradients bit by bit. One tile of
    keys adds to dq, so that its bits are the same in any order."""
    bias = None if radius is None else normal(4, 2 * radius + 1).float()
    near = Call(normal(2, 9, 4, 40), normal(2, 33, 2, 40), normal(2, 33, 2, 24), right=0, distance_bias=bias)
    dout, n = normal(2, 9, 4, 24), ("batch", "row", "head").index(dim)
    far = FarStorage(near.q.dtype)
    q, k, v, far_dout = (far.place(x, n) for x in (near.q, near.k, near.v, dout))
    assert same(lane, dataclasses.replace(near, q=q, k=k, v=v), near, far_dout, dout, deterministic)


test_packed_strides = large.test_packed_strides
test_merge_strides = large.test_merge_strides
test_pages = large.test_pages
