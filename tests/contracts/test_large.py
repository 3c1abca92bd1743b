"""Indices past 2^31 elements, and memory that does not grow with Sq * Sk."""

from __future__ import annotations

import dataclasses
import mmap
import subprocess
import sys

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from ..lanes import Lane, run
from ..oracle import Call

FAR = 2**31 + 8  # elements: beyond 32 bits with a sign
APART = 2**17  # elements between tensors that share the far storage
MAP_NORESERVE = 0x4000  # Linux; Python's module has it from 3.13 on


@pytest.fixture
def lane(lane: Lane) -> Lane:
    if sys.platform != "linux":
        pytest.skip("address space without memory is had from Linux here")
    if lane.backend == "triton" or lane.device != "cpu":
        pytest.skip("gigabytes of address space cost nothing on the CPU alone, and the interpreter copies them")
    return lane


class FarStorage:
    """Address space for more than 2^31 elements, of which only pages that are touched become memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = mmap.mmap(-1, (FAR + 16 * APART) * dtype.itemsize, flags=flags)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.flat, self.next = torch.frombuffer(memory, dtype=dtype), 0

    def place(self, x: Tensor, dim: int) -> Tensor:
        """x with the entries of dimension `dim` so far apart that the last lies FAR behind the first."""
        strides = list(x.contiguous().stride())
        strides[dim] = -(-FAR // (x.shape[dim] - 1) // 16) * 16
        far = self.flat.as_strided(x.shape, strides, self.next)
        self.next += APART
        assert strides[dim] * (x.shape[dim] - 1) >= 2**31 and x.dtype == self.flat.dtype
        return far.copy_(x)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same(lane: Lane, call: Call, near: Call, dout: Tensor, near_dout: Tensor, deterministic: bool = True) -> bool:
    got, expected = (run(c, lane, d, deterministic=deterministic) for c, d in ((call, dout), (near, near_dout)))
    return set(got) == set(expected) and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dim", ["batch", "row", "head"])
def test_dense_strides(lane: Lane, dim: str) -> None:
    """q, k, v, the gradient of out and a bias, each stretched along one dimension: outputs and gradients bit by bit."""
    near = Call(normal(2, 9, 4, 40), normal(2, 33, 2, 40), normal(2, 33, 2, 24), right=0, bias=normal(2, 4, 9, 33))
    dout, n = normal(2, 9, 4, 24), ("batch", "row", "head").index(dim)
    far = FarStorage(torch.bfloat16)
    q, k, v, far_dout = (far.place(x, n) for x in (near.q, near.k, near.v, dout))
    bias = far.place(near.bias, (0, 2, 1)[n])
    assert same(lane, dataclasses.replace(near, q=q, k=k, v=v, bias=bias), near, far_dout, dout)


@pytest.mark.parametrize("dim", ["row", "head"])
def test_packed_strides(lane: Lane, dim: str) -> None:
    cu = torch.tensor([0, 5, 5, 18], dtype=torch.int32)
    near = Call(normal(18, 2, 16), normal(18, 2, 16), normal(18, 2, 16), cu, cu)
    dout, n = normal(18, 2, 16), ("row", "head").index(dim)
    far = FarStorage(torch.bfloat16)
    q, k, v, far_dout = (far.place(x, n) for x in (near.q, near.k, near.v, dout))
    assert same(lane, dataclasses.replace(near, q=q, k=k, v=v), near, far_dout, dout)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("dim", range(4))
def test_bias_strides(lane: Lane, dim: int, dtype: torch.dtype) -> None:
    near = Call(*(normal(2, n, 2, 16) for n in (7, 20, 20)))
    near.bias = normal(2, 2, 7, 20) > -0.5 if dtype == torch.bool else normal(2, 2, 7, 20, dtype=dtype)
    far = dataclasses.replace(near, bias=FarStorage(dtype).place(near.bias, dim))
    dout = normal(2, 7, 2, 16)
    assert same(lane, far, near, dout, dout)


@pytest.mark.parametrize("dim", ["batch", "row", "head"])
def test_merge_strides(lane: Lane, dim: str) -> None:
    n = ("batch", "row", "head").index(dim)
    outs, lses = [normal(2, 5, 3, 8) for _ in range(2)], [normal(2, 3, 5, dtype=torch.float32) + k for k in range(2)]
    far_out, far_lse = FarStorage(torch.bfloat16), FarStorage(torch.float32)
    got = da.merge_attention(
        [far_out.place(x, n) for x in outs], [far_lse.place(x, (0, 2, 1)[n]) for x in lses], backend=lane.backend
    )
    assert all(map(torch.equal, got, da.merge_attention(outs, lses, backend=lane.backend)))


MEASURE = """
import sys
import torch
import duplex_attn as da
from duplex_attn.profile.memory import peak_memory

seqlen, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(2)


def inputs(n):
    tensors = [torch.randn(1, n, 2, 32).to(dtype) for _ in range(3)]
    tensors += [torch.zeros(1, 1, 1, n), torch.zeros(2, 33), torch.zeros(2)]
    return [x.requires_grad_() for x in tensors], torch.ones(1, n, 2, 32).to(dtype)


def step(tensors, dout):
    q, k, v, bias, table, sink = tensors
    out = da.attention(q, k, v, da.causal(), bias=bias, distance_bias=table, sink=sink, deterministic=True, backend="cpu")
    torch.autograd.grad(out, tensors, dout)


step(*inputs(64))
case = inputs(seqlen)
print(peak_memory(lambda: step(*case), torch.device("cpu")))
"""


@pytest.mark.skipif(not da.backends()["cpu"].available, reason="built without the CPU backend")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_the_square_of_the_length(dtype: str) -> None:
    """Forward and backward with biases, at a length whose scores in one head alone would be 64 MiB."""
    seqlen = 4096
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(seqlen), dtype], capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell its peak memory")
    of_rows = seqlen * 2 * 32 * 4  # q in float32
    assert int(done.stdout) < 4 * of_rows + 8 * 2**20, (
        "out, three gradients, what a row keeps, and scratch of two threads"
    )


@pytest.mark.parametrize("dim", ["page", "slot", "head"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_pages(lane: Lane, stored: torch.dtype, dim: str) -> None:
    """Appended to, copied and read where an entry lies past 2^31 elements, with the bits of pages that lie close."""
    at = ("page", "slot", "head").index(dim)
    k, v = normal(6, 3, 32), normal(6, 3, 32) + 1
    near = [torch.zeros(5, 4, 3, 32, dtype=stored) for _ in range(2)]
    storage = FarStorage(stored)
    far = [storage.place(x, at) for x in near]
    table, lengths = torch.tensor([[4, 0], [1, 3]], dtype=torch.int32), torch.tensor([4, 8], dtype=torch.int32)
    positions = torch.tensor([3, 2, 7, 6, 5, 4], dtype=torch.int32)
    src, dst = torch.tensor([4], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    got = []
    for pages in (near, far):
        scales = {name: torch.zeros(5, 4, 3) for name in ("k_scales", "v_scales")} if stored == torch.int8 else {}
        cu = torch.tensor([0, 2, 6], dtype=torch.int32)
        da.paged_append(k, v, *pages, table, positions, cu, **scales, backend=lane.backend)
        da.copy_pages(*pages, src, dst, **scales, backend=lane.backend)
        copied = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        q = normal(2, 6, 32)
        out = da.paged_attention(q, *pages, copied, lengths, **scales, backend=lane.backend)
        got.append((out, *(x.contiguous() for x in pages)))
    for close, apart in zip(*got, strict=True):
        assert torch.equal(close, apart) and close.any()
