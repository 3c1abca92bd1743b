"""When Hopper's kernel for all gradients is taken: where order is free, and memory has room for dq in float32."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch
from duplex_attn.call import GRADIENTS
from torch import Tensor

from ..lanes import Lane
from .library import EMULATED, draw, launched

BF16 = torch.bfloat16


def kernels_of(
    q: Tensor, k: Tensor, v: Tensor, *, wanted: str = "qkv", deterministic: bool = False, nothing: bool = False
) -> set[str]:
    """Of dense tensors; with `nothing`, lengths of 0 leave the kernels nothing to do."""
    lengths = torch.zeros(q.shape[0], dtype=torch.int32) if nothing else None
    call = (
        q, k, v, None, None, q.shape[1], k.shape[1], lengths, lengths, None, None, None, None, None, False,
        None, None, None, None, None, None, None, 0.0, 0.0, None, deterministic, False,
    )  # fmt: skip
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=BF16)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    draw(0)
    launched()
    mask = sum(1 << n for n, name in enumerate(GRADIENTS) if name in wanted)
    torch.ops.duplex_attn_cuda.attention_backward(out, None, out, lse, *call, mask)
    return set(launched()) & {"dq", "dkdv", "fused", "finish_dq"}


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=BF16)


@pytest.mark.parametrize(
    ("card", "dims", "wanted", "deterministic", "expected"),
    [
        (90, (64, 64), "qkv", False, {"fused", "finish_dq"}),
        (90, (64, 128), "qkv", False, {"fused", "finish_dq"}),
        (90, (64, 64), "qk", False, {"fused", "finish_dq"}),
        (90, (64, 64), "qkv", True, {"dq", "dkdv"}),
        (90, (64, 64), "q", False, {"dq"}),
        (90, (64, 64), "kv", False, {"dkdv"}),
        (90, (64, 136), "qkv", False, {"dq", "dkdv"}),
        (80, (64, 64), "qkv", False, {"dq", "dkdv"}),
    ],
)
def test_what_it_is_for(
    emulated: Lane, card: int, dims: tuple[int, int], wanted: str, deterministic: bool, expected: set[str]
) -> None:
    q, v = zeros(1, 5, 2, dims[0]), zeros(1, 5, 2, dims[1])
    with EMULATED.on(card):
        assert kernels_of(q, q, v, wanted=wanted, deterministic=deterministic) == expected


def test_torch_s_switch_is_obeyed(emulated: Lane) -> None:
    q = zeros(1, 5, 2, 64).requires_grad_()
    for switch in (False, True):
        torch.use_deterministic_algorithms(switch)
        try:
            launched()
            da.attention(q, q, q, backend="cuda").sum().backward()
            assert ("fused" in launched()) != switch
        finally:
            torch.use_deterministic_algorithms(False)


# Rows of queries and of keys, heads of both, head_dim, batch; whether it is taken. Sums have the kernel's head_dim, and
# 128 rows of a sequence or a multiple of them.
SIZES = [
    ((4096, 4096, (2, 2), 64, 1), True),
    ((4096, 4096, (8, 1), 128, 1), True),
    ((4096, 4096, (9, 1), 128, 1), False),
    ((4096, 8192, (9, 1), 128, 1), True),
    ((4096, 1024, (8, 1), 128, 1), False),
    ((4096, 4096, (4, 4), 40, 1), True),
    ((4096, 4096, (4, 4), 32, 1), False),
    ((64, 64, (4, 4), 128, 7), True),  # less than the allocator gives out at a time
    ((64, 64, (4, 4), 128, 9), False),
    ((128, 128, (4, 4), 128, 64), True),
    ((129, 129, (4, 4), 128, 64), False),
]


@pytest.mark.parametrize(("size", "taken"), SIZES, ids=str)
def test_it_stays_within_the_promise_of_memory(
    emulated: Lane, size: tuple[int, int, tuple[int, int], int, int], taken: bool
) -> None:
    """Beside q, k, v, out, lse and their gradients 0.45 times their bytes at most, or what is little."""
    rows_q, rows_k, (heads, heads_kv), dim, batch = size
    q, k = zeros(batch, rows_q, heads, dim), zeros(batch, rows_k, heads_kv, dim)
    promised = 2 * (2 * q.nbytes + 2 * k.nbytes) + 4 * batch * heads * rows_q
    padded = batch * -(-rows_q // 128) * 128 * heads
    workspace = padded * (4 * (64 if dim <= 64 else 128) + 2 * 4)
    assert (workspace <= max(0.45 * promised, 2 * 2**20)) == taken
    assert ("fused" in kernels_of(q, k, k, nothing=True)) == taken
