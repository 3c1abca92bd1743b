"""Autocast, vmap and torch.func: what composes gives the plain formula's numbers, what does not says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duplex_attn as da
import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .calls import HEADS, HEADS_KV, int32

SAMPLES, BATCH, SEQLEN_Q, SEQLEN_K, DIM = 3, 2, 5, 7, 8
Q, K = (BATCH, SEQLEN_Q, HEADS, DIM), (BATCH, SEQLEN_K, HEADS_KV, DIM)
BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    status = da.backends()[request.param]
    if not status.available:
        pytest.skip(status.detail)
    return request.param


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, bottom right, in torch's own operations; q with k's heads."""
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril(s.shape[-1] - s.shape[-2])
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(torch.where(seen, s, -torch.inf), -1), v)


def one_by_one(function: Callable[..., Any], in_dims: tuple[int | None, ...], *inputs: Tensor) -> list[Tensor]:
    """What vmap promises: each sample for itself, stacked."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=True) if d is not None)
    samples = [[x if d is None else x.select(d, n) for x, d in zip(inputs, in_dims, strict=True)] for n in range(size)]
    results = [function(*sample) for sample in samples]
    return [torch.stack(parts) for parts in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True)]


def assert_vmap(function: Callable[..., Any], in_dims: tuple[int | None, ...], *inputs: Tensor, **options: Any) -> None:
    got = vmap(function, in_dims, **options)(*inputs)
    for a, b in zip(got if isinstance(got, tuple) else (got,), one_by_one(function, in_dims, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_over_nothing() -> None:
    x, lse = randn(0, *Q), randn(0, BATCH, HEADS, SEQLEN_Q)
    assert vmap(lambda q: da.attention(q, q, q))(x).shape == x.shape
    assert vmap(grad(lambda q: da.attention(q, q, q).sum()))(x).shape == x.shape
    assert vmap(lambda out, lse: da.merge_attention([out], [lse])[0])(x, lse).shape == x.shape


class TestAutocast:
    def test_casts_q_k_v_and_only_them(self, backend: str) -> None:
        """float32 biases and tables keep their digits: the call equals the one with q, k, v cast by hand, not the one with all cast."""
        q, k, v, bias, table, slopes, sink = (
            x.requires_grad_() for x in (randn(*Q), randn(*K), randn(*K), randn(5, 7), randn(HEADS, 5), randn(HEADS), randn(HEADS))
        )  # fmt: skip
        small = 1 + 1e-4 * bias.detach()  # lost in bfloat16
        terms = {
            "distance_bias": table,
            "alibi_slopes": slopes.detach(),
            "sink": sink,
            "backend": backend,
            "return_lse": True,
        }
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = da.attention(q, k, v, bias=small * bias, **terms)
        by_hand = [x.bfloat16() for x in (q, k, v)]
        expected, expected_lse = da.attention(*by_hand, bias=small * bias, **terms)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        all_cast = {n: x.bfloat16() if isinstance(x, Tensor) else x for n, x in terms.items()}
        assert not torch.equal(lse, da.attention(*by_hand, bias=(small * bias).bfloat16(), **all_cast)[1])
        leaves = (q, k, v, bias, table, sink)
        grads = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
        assert [x.dtype for x in grads] == [torch.float32] * 6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_packed(self, dtype: torch.dtype) -> None:
        q, k, v = randn(6, HEADS, DIM), randn(8, HEADS_KV, DIM), randn(8, HEADS_KV, DIM)
        cu = (int32(0, 3, 6), int32(0, 2, 8), 3, 6)
        with torch.autocast("cpu", dtype):
            out = da.varlen_attention(q, k, v, *cu)
        assert out.dtype == dtype and torch.equal(out, da.varlen_attention(*(x.to(dtype) for x in (q, k, v)), *cu))

    def test_mixed_dtypes_become_one(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert da.attention(randn(*Q).half(), randn(*K), randn(*K).bfloat16()).dtype == torch.bfloat16

    def test_float64_and_off_leave_everything(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert da.attention(*(randn(*x).double() for x in (Q, K, K))).dtype == torch.float64
            with torch.autocast("cpu", enabled=False):
                assert da.attention(randn(*Q), randn(*K), randn(*K)).dtype == torch.float32

    def test_integers_stay_an_error(self) -> None:
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=r"^q: expected float32.*got torch.int64"),
        ):
            da.attention(*(randn(*x).long() for x in (Q, K, K)))


class TestVmap:
    @pytest.mark.parametrize(
        "in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 1), (2, 1, 4), (-1, 0, None)]
    )
    def test_outputs(self, backend: str, in_dims: tuple[int | None, ...]) -> None:
        inputs = [
            randn(*shape) if d is None else randn(SAMPLES, *shape).movedim(0, d)
            for d, shape in zip(in_dims, (Q, K, K), strict=True)
        ]
        assert_vmap(
            lambda q, k, v: da.attention(q, k, v, da.causal(), return_lse=True, backend=backend), in_dims, *inputs
        )

    def test_lengths_prefix_and_bias_of_each_sample(self, backend: str) -> None:
        def function(
            q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor, starts_k: Tensor, prefix: Tensor, bias: Tensor
        ) -> Any:
            lengths = {"seqlens_k": seqlens_k, "starts_k": starts_k}
            return da.attention(q, k, v, da.prefix_lm(prefix), bias=bias, **lengths, return_lse=True, backend=backend)

        inputs = [randn(SAMPLES, *Q), randn(*K), randn(SAMPLES, *K)]
        inputs += [torch.randint(0, 4, (SAMPLES, BATCH), dtype=torch.int32) for _ in range(3)]
        for bias in (randn(SAMPLES, HEADS, 1, SEQLEN_K), randn(SAMPLES, BATCH, 1, SEQLEN_Q, SEQLEN_K)):
            assert_vmap(function, (0, None, 0, 0, 0, 0, 0), *inputs, bias)

    def test_shared_terms(self, backend: str) -> None:
        bias, table, sink, lens = randn(BATCH, HEADS, SEQLEN_Q, SEQLEN_K), randn(HEADS, 5), randn(HEADS), int32(7, 3)
        shared = {"bias": bias, "distance_bias": table, "sink": sink, "alibi_slopes": randn(HEADS), "seqlens_k": lens}
        inputs = [randn(SAMPLES, *x) for x in (Q, K, K)]
        assert_vmap(
            lambda q, k, v: da.attention(q, k, v, da.prefix_lm(2), backend=backend, **shared), (0, 0, 0), *inputs
        )

    def test_nested(self, backend: str) -> None:
        q, k, v = randn(2, SAMPLES, *Q), randn(SAMPLES, *K), randn(2, *K)
        inner = vmap(lambda q, k, v: da.attention(q, k, v, backend=backend), (0, 0, None))
        assert_vmap(inner, (0, None, 0), q, k, v)

    def test_merge(self, backend: str) -> None:
        outs, lses = [randn(SAMPLES, *Q) for _ in range(2)], [randn(SAMPLES, BATCH, HEADS, SEQLEN_Q) for _ in range(2)]
        assert_vmap(lambda a, b, c, d: da.merge_attention((a, b), (c, d), backend=backend), (0, 0, 0, 0), *outs, *lses)

    def test_gradients_of_each_sample(self, backend: str) -> None:
        def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return da.attention(q, k, v, da.causal(), bias=bias, backend=backend).sin().sum()

        for bias in (randn(1, HEADS, 1, SEQLEN_K), randn(BATCH, 1, SEQLEN_Q, 1)):
            inputs = [randn(SAMPLES, *Q), randn(*K), randn(SAMPLES, *K), bias]
            assert_vmap(grad(loss, (0, 1, 2, 3)), (0, None, 0, None), *inputs)

    def test_jacobian(self, backend: str) -> None:
        """jacrev is vmap over the backward operator."""
        q, k, v = randn(1, 2, HEADS, 3), randn(1, 3, HEADS_KV, 3), randn(1, 3, HEADS_KV, 3)
        got = jacrev(lambda *x: da.attention(*x, da.causal(), backend=backend), (0, 1, 2))(q, k, v)
        for a, b in zip(got, jacrev(plain, (0, 1, 2))(q, k, v), strict=True):
            torch.testing.assert_close(a, b)

    def test_gradient_outside(self, backend: str) -> None:
        """Autograd through vmap: what every sample shares gets the sum."""
        q, k, v = randn(SAMPLES, *Q).requires_grad_(), randn(*K).requires_grad_(), randn(SAMPLES, *K).requires_grad_()
        results = []
        for function in (lambda *x: da.attention(*x, da.causal(), backend=backend), plain):
            results.append(torch.autograd.grad(vmap(function, (0, None, 0))(q, k, v).cos().sum(), (q, k, v)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    def test_dropout_differs_between_samples(self) -> None:
        q, k, v = (randn(*x).expand(SAMPLES, *x) for x in (Q, K, K))
        for seed in (None, 3):
            out = vmap(lambda *x, seed=seed: da.attention(*x, dropout_p=0.5, seed=seed), randomness="different")(
                q, k, v
            )
            assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])

    def test_packed_is_refused(self) -> None:
        def function(q: Tensor) -> Tensor:
            return da.varlen_attention(q, q, q, int32(0, 3, 6), int32(0, 3, 6), 3, 3)

        with pytest.raises(ValueError, match="vmap: expected a dense call, got a packed one"):
            vmap(function)(randn(SAMPLES, 6, HEADS, DIM))
        lse = randn(SAMPLES, HEADS, 6)
        with pytest.raises(ValueError, match="vmap: expected dense parts, got packed ones"):
            vmap(lambda out, lse: da.merge_attention([out], [lse]))(randn(SAMPLES, 6, HEADS, DIM), lse)

    @pytest.mark.parametrize("name", ["distance_bias", "alibi_slopes", "sink"])
    def test_a_table_for_each_sample_is_refused(self, name: str) -> None:
        table = randn(SAMPLES, HEADS, 5) if name == "distance_bias" else randn(SAMPLES, HEADS)
        with pytest.raises(ValueError, match=f"{name}: expected the same for every sample of vmap, got one for each"):
            vmap(lambda q, x: da.attention(q, q, q, **{name: x}))(randn(SAMPLES, *Q), table)

    @pytest.mark.parametrize("name", ["distance_bias", "sink"])
    def test_a_gradient_of_a_table_for_each_sample_is_refused(self, name: str) -> None:
        table = randn(HEADS, 5) if name == "distance_bias" else randn(HEADS)
        loss = grad(lambda x, q: da.attention(q, q, q, **{name: x}).sum())
        with pytest.raises(ValueError, match=f"{name}: expected no gradient under vmap"):
            vmap(loss, (None, 0))(table, randn(SAMPLES, *Q))

    @pytest.mark.parametrize("randomness", ["error", "same"])
    def test_dropout_that_would_not_differ_is_refused(self, randomness: str) -> None:
        with pytest.raises(
            ValueError, match=r"dropout_p: expected 0 under vmap unless randomness='different', got 0\.5"
        ):
            vmap(lambda q: da.attention(q, q, q, dropout_p=0.5, seed=1), randomness=randomness)(randn(SAMPLES, *Q))


class TestFunc:
    def test_grad_and_vjp(self, backend: str) -> None:
        inputs = randn(*Q), randn(*K), randn(*K)

        def fused(*x: Tensor) -> Tensor:
            return da.attention(*x, da.causal(), backend=backend)

        out, pull = vjp(fused, *inputs)
        expected, expected_pull = vjp(plain, *inputs)
        torch.testing.assert_close(out, expected)
        dout = randn(*Q)
        results = [(pull(dout), expected_pull(dout))]
        results += [tuple(grad(lambda *x, f=f: f(*x).sin().sum(), (0, 1, 2))(*inputs) for f in (fused, plain))]
        for got, want in results:
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)

    def test_vjp_of_a_packed_call_and_of_merge(self, backend: str) -> None:
        def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            parts = [
                da.varlen_attention(q, k[s], v[s], int32(0, 6), int32(0, 4), 6, 4, return_lse=True, backend=backend)
                for s in (slice(0, 4), slice(4, 8))
            ]
            return da.merge_attention(*zip(*parts, strict=True), backend=backend)

        inputs = randn(6, HEADS, DIM), randn(8, HEADS_KV, DIM), randn(8, HEADS_KV, DIM)
        (out, lse), pull = vjp(function, *inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected = function(*leaves)
        given = randn(*out.shape), randn(*lse.shape)
        for a, b in zip(pull(given), torch.autograd.grad(expected, leaves, given), strict=True):
            torch.testing.assert_close(a, b)

    def test_grad_of_a_module(self) -> None:
        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.project = torch.nn.Linear(DIM, DIM)

            def forward(self, x: Tensor) -> Tensor:
                return da.attention(self.project(x), x, x).square().mean()

        block, x = Block(), randn(*Q)
        got = grad(lambda parameters: functional_call(block, parameters, (x,)))(dict(block.named_parameters()))
        block(x).backward()
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad)


class TestRefused:
    def loss(self, q: Tensor) -> Tensor:
        return da.attention(q, q, q).sum()

    @pytest.mark.parametrize(
        "differentiate", [lambda f, x: jvp(f, (x,), (x,)), lambda f, x: jacfwd(f)(x)], ids=["jvp", "jacfwd"]
    )
    def test_forward_mode_of_torch_func(self, differentiate: Callable[..., Any]) -> None:
        with pytest.raises(RuntimeError, match="duplex_attn: there are no forward-mode derivatives; use reverse mode"):
            differentiate(self.loss, randn(*Q))

    def test_forward_mode_of_dual_tensors(self) -> None:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(randn(*Q), randn(*Q))
            with pytest.raises(
                RuntimeError, match="duplex_attn: there are no forward-mode derivatives; use reverse mode"
            ):
                self.loss(dual)

    def test_forward_mode_of_merge(self) -> None:
        out, lse = randn(*Q), randn(BATCH, HEADS, SEQLEN_Q)
        with pytest.raises(RuntimeError, match="duplex_attn: there are no forward-mode derivatives; use reverse mode"):
            jvp(lambda x: da.merge_attention([x, out], [lse, lse])[0], (out,), (out,))

    def test_second_derivatives(self) -> None:
        x = randn(*Q).requires_grad_()
        (first,) = torch.autograd.grad(self.loss(x), x, create_graph=True)
        with pytest.raises(
            RuntimeError, match="duplex_attn: attention has no second derivatives; differentiate it once"
        ):
            first.sum().backward()

    @pytest.mark.parametrize("differentiate", [lambda f, x: grad(lambda y: grad(f)(y).sum())(x), lambda f, x: jacrev(jacrev(f))(x)], ids=["grad_of_grad", "jacrev_of_jacrev"])  # fmt: skip
    def test_second_derivatives_of_torch_func(self, differentiate: Callable[..., Any]) -> None:
        with pytest.raises(
            RuntimeError, match="duplex_attn: attention has no second derivatives; differentiate it once"
        ):
            differentiate(self.loss, randn(1, 2, 2, 3))

    def test_hessian(self) -> None:
        with pytest.raises(RuntimeError, match="duplex_attn: "):
            hessian(self.loss)(randn(1, 2, 2, 3))
