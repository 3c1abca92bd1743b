"""torch.compile(fullgraph=True): the numbers of eager code, and one compilation for every prefix, length and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duplex_attn as da
import pytest
import torch
from torch import Tensor

from .calls import HEADS, HEADS_KV, int32

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def recompilation_is_an_error() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def dense_qkv(batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 7) -> list[Tensor]:
    return [
        normal(batch, seqlen_q, HEADS, 8),
        normal(batch, seqlen_k, HEADS_KV, 8),
        normal(batch, seqlen_k, HEADS_KV, 6),
    ]


def packed_qkv(total_q: int = 6, total_k: int = 8) -> list[Tensor]:
    return [normal(total_q, HEADS, 8), normal(total_k, HEADS_KV, 8), normal(total_k, HEADS_KV, 6)]


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, distance_bias: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    return da.attention(
        2 * q, k, v, da.causal(), bias=bias, distance_bias=distance_bias, sink=sink, softcap=3.0, scale=0.4,
        return_lse=True, deterministic=True,
    )  # fmt: skip


def packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    window = da.sliding_window(2, 1)
    return da.varlen_attention(
        2 * q, k, v, cu_q, cu_k, 4, 3, window, alibi_slopes=slopes, return_lse=True, deterministic=True
    )


def merge(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [da.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 3), slice(3, None))]
    return da.merge_attention(*zip(*parts, strict=True))


def one_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(da.attention(q, k, v).flatten(2)).sum(-1)


CALLS: dict[str, tuple[Function, Callable[[], list[Tensor]]]] = {
    "attention": (dense, lambda: [*dense_qkv(), normal(HEADS, 5, 7), normal(HEADS, 5), normal(HEADS)]),
    "varlen_attention": (packed, lambda: [*packed_qkv(), int32(0, 3, 3, 5), int32(0, 2, 5, 8), normal(HEADS).abs()]),
    "merge_attention": (merge, dense_qkv),
    "one_result": (one_result, dense_qkv),
}


def results(function: Function, tensors: list[Tensor], gradients: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(gradients and x.is_floating_point()) for x in tensors]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    assert all(x.requires_grad == gradients for x in outputs)
    if not gradients:
        return outputs
    sum((x.masked_fill(x == -torch.inf, 0) * normal(*x.shape)).sum() for x in outputs).backward()
    return [*outputs, *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_equals_eager(name: str, gradients: bool) -> None:
    function, tensors = CALLS[name]
    expected = results(function, tensors(), gradients)
    got = results(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors(), gradients)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))


def test_inductor_equals_eager() -> None:
    """Inductor passes on strides and fuses around the call; the call itself stays one operator."""

    def block(x: Tensor, prefix: Tensor) -> Tensor:
        q, k, v = (2 * x).transpose(1, 2).chunk(3, -1)
        return torch.relu(da.attention(q, k, v, da.prefix_lm(prefix)))

    tensors = [normal(2, HEADS, 6, 3 * 8), int32(0, 4)]
    expected, got = (results(f, tensors, True) for f in (block, torch.compile(block, fullgraph=True)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def compare_all(
    function: Function, inputs: list[list[Any]], dynamic: bool | None = None, gradients: bool = True
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in inputs:
        tensors = [x for x in case if isinstance(x, Tensor)]
        others = [x for x in case if not isinstance(x, Tensor)]
        expected, got = (
            results(lambda *x, f=f, others=others: f(*x, *others), tensors, gradients) for f in (function, compiled)
        )
        assert all(map(torch.equal, got, expected))


def test_another_prefix_tensor_is_no_recompilation() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
        return da.attention(q, k, v, da.prefix_lm(prefix), deterministic=True)

    compare_all(function, [[*dense_qkv(), int32(*prefix)] for prefix in ((0, 0), (3, 7), (100, -1))])


def test_other_lengths_are_no_recompilation() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, *lengths: Tensor) -> Tensor:
        names = ("seqlens_q", "starts_q", "seqlens_k", "starts_k")
        return da.attention(q, k, v, da.causal(), deterministic=True, **dict(zip(names, lengths, strict=True)))

    lengths = [((5, 3), (0, 2), (7, 0), (0, 3)), ((0, 0), (0, 0), (0, 0), (0, 0)), ((1, 4), (4, 0), (2, 6), (5, 1))]
    compare_all(function, [[*dense_qkv(), *(int32(*x) for x in case)] for case in lengths])


def test_other_cu_seqlens_are_no_recompilation() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return da.varlen_attention(q, k, v, cu_q, cu_k, 6, 8, da.causal(), deterministic=True)

    cuts = [((0, 3, 6), (0, 4, 8)), ((0, 0, 5), (0, 8, 8)), ((0, 0, 0), (0, 0, 0))]
    compare_all(function, [[*packed_qkv(), *(int32(*x) for x in case)] for case in cuts])


def test_one_compilation_serves_every_dense_shape_and_int_prefix() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, prefix: int) -> Tensor:
        return da.attention(q, k, v, da.prefix_lm(prefix), bias=bias, deterministic=True)

    shapes = [(3, 5, 7, 9), (2, 9, 4, 2), (6, 2, 30, 17)]
    cases = [[*dense_qkv(b, sq, sk), normal(HEADS, sq, sk), prefix] for b, sq, sk, prefix in shapes]
    compare_all(function, cases, dynamic=True)


def test_one_compilation_serves_every_packed_shape() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        return da.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, da.causal(), deterministic=True)

    cases = [
        [*packed_qkv(9, 11), int32(0, 2, 9), int32(0, 7, 11), 7, 10],
        [*packed_qkv(30, 20), int32(0, 9, 10, 28), int32(0, 7, 17, 20), 18, 10],
        [*packed_qkv(3, 5), int32(0, 3, 3, 3, 3, 3), int32(0, 5, 5, 5, 5, 5), 3, 6],
    ]
    compare_all(function, cases, dynamic=True)


def test_merge_compiles_once_for_every_shape() -> None:
    compare_all(merge, [dense_qkv(3, 5, 7), dense_qkv(2, 9, 14), dense_qkv(5, 2, 31)], dynamic=True)


def test_a_bound_read_from_the_lengths_compiles() -> None:
    """max_seqlen computed from cu_seqlens inside the compiled function, so its value is unknown while tracing."""

    def function(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        longest_q, longest_k = (int(cu.diff().max()) for cu in (cu_q, cu_k))
        return da.varlen_attention(q, k, v, cu_q, cu_k, longest_q, longest_k, deterministic=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compare_all(
            function,
            [[*packed_qkv(), int32(*q), int32(*k)] for q, k in (((0, 3, 6), (0, 4, 8)), ((0, 1, 2), (0, 8, 8)))],
        )


def test_a_window_read_from_a_tensor_compiles() -> None:
    """One of no legal distance is refused when the compiled code runs, as in eager code."""

    def function(q: Tensor, k: Tensor, v: Tensor, left: Tensor) -> Tensor:
        return da.attention(q, k, v, da.sliding_window(left.item()), deterministic=True)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compare_all(function, [[*dense_qkv(), torch.tensor(left)] for left in (1, 3, -2)])
        torch.compiler.reset()
        with pytest.raises(ValueError, match=r"left: expected a distance of at most .*, got 1073741825"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(*dense_qkv(), torch.tensor(2**30 + 1))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd(name: str) -> None:
    function, tensors = CALLS[name]
    expected = results(function, tensors(), gradients=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        got = results(function, tensors(), gradients=True)
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("seed", [None, 7, "tensor"])
def test_dropout_draws_as_eager_does(seed: int | str | None) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, *seeds: Tensor) -> Tensor:
        drawn = seeds[0] if seeds else seed
        return da.attention(q, k, v, dropout_p=0.5, seed=drawn, deterministic=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    seen = []
    for value in (7, 8):
        inputs = [*dense_qkv(), torch.tensor([value])] if seed == "tensor" else dense_qkv()
        torch.manual_seed(value)
        expected = results(function, inputs, True)
        torch.manual_seed(value)
        got = results(compiled, inputs, True)
        assert all(map(torch.equal, got, expected))
        seen.append(got[0])
    assert torch.equal(*seen) == (seed == 7)


def test_autocast_inside_compiled_code_casts_q_k_v() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return da.attention(q, k, v, bias=bias, deterministic=True)

    tensors = [*dense_qkv(), normal(HEADS, 5, 7)]
    expected, got = (
        results(f, tensors, True) for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    )
    assert got[0].dtype == torch.bfloat16 and [x.dtype for x in got[1:]] == [torch.float32] * 4
    assert all(map(torch.equal, got, expected))
