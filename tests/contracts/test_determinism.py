"""The same call gives the same bits: run to run, with the same seed, and alone or among other sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import BACKENDS
from duplex_attn.call import Call as OperatorCall
from torch import Tensor

from ..cases import BFLOAT16, FLOAT16, FLOAT32, Case, Problem, make
from ..lanes import Lane, on, run
from ..oracle import Answer, Call


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def same_bits(a: Answer, b: Answer) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def ragged(lane: Lane, layout: str, dtype: torch.dtype, **given: object) -> Problem:
    lengths = ((250, 1, 0, 97, 333), (310, 70, 9, 3, 334)) if lane.backend == "cpu" else ((17, 0, 3), (20, 9, 5))
    heads = (2, 1) if lane.slow else (4, 2)
    return make(Case(layout, lengths, heads, (40, 24), dtype, seed=3, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize(("layout", "dtype"), [("packed", FLOAT32), ("packed", FLOAT16), ("padded_anywhere", BFLOAT16)])
def test_the_same_bits_in_every_run(lane: Lane, layout: str, dtype: torch.dtype) -> None:
    """Forward always, every gradient when deterministic: also those that many rows add to."""
    terms = {"mask": "prefix_each", "bias": "keys", "distance_radius": 7, "sink": "float32", "dropout_p": 0.2}
    made = ragged(lane, layout, dtype, **terms)
    repeats = 1 if lane.slow else 3
    first = run(made.call, lane, made.dout, made.dlse, deterministic=True)
    assert {"dq", "dk", "dv", "dbias", "ddistance_bias", "dsink"} <= first.keys()
    for _ in range(repeats):
        assert same_bits(run(made.call, lane, made.dout, made.dlse, deterministic=True), first)
    for _ in range(repeats):
        any_order = run(made.call, lane, made.dout, made.dlse, deterministic=False)
        assert torch.equal(any_order["out"], first["out"]) and torch.equal(any_order["lse"], first["lse"])


def test_torch_s_switch_is_obeyed_unless_the_call_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = BACKENDS["reference"].attention_forward

    def spy(*arguments: object) -> tuple[Tensor, Tensor]:
        seen.append(OperatorCall(*arguments).deterministic)  # type: ignore[arg-type]
        return real(*arguments)

    monkeypatch.setattr(BACKENDS["reference"], "attention_forward", spy)
    x = torch.randn(1, 2, 1, 8)
    for switch in (False, True):
        torch.use_deterministic_algorithms(switch)
        try:
            for given in (None, False, True):
                da.attention(x, x, x, deterministic=given, backend="reference")
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [False, False, True, True, False, True]


def alone(call: Call, b: int) -> Call:
    """Sequence b of a packed or padded call by itself, with no padding around it."""
    if call.cu_seqlens_q is not None:
        (q0, q1), (k0, k1) = call.cu_seqlens_q[b : b + 2].tolist(), call.cu_seqlens_k[b : b + 2].tolist()
        cu = {"cu_seqlens_q": torch.tensor([0, q1 - q0]).int(), "cu_seqlens_k": torch.tensor([0, k1 - k0]).int()}
        q, k, v = call.q[q0:q1], call.k[k0:k1], call.v[k0:k1]
    else:
        (q0, nq), (k0, nk) = (
            (int(s[b]), int(n[b])) for s, n in ((call.starts_q, call.seqlens_q), (call.starts_k, call.seqlens_k))
        )
        cu = dict.fromkeys(("seqlens_q", "seqlens_k", "starts_q", "starts_k"))
        q, k, v = call.q[b : b + 1, q0 : q0 + nq], call.k[b : b + 1, k0 : k0 + nk], call.v[b : b + 1, k0 : k0 + nk]
    prefix = call.prefix[b : b + 1] if isinstance(call.prefix, Tensor) else call.prefix
    return dataclasses.replace(call, q=q, k=k, v=v, prefix=prefix, **cu)


@pytest.mark.parametrize(("layout", "mask", "dtype"), [
    ("packed", "full", FLOAT32),
    ("packed", "window_both", BFLOAT16),
    ("padded_anywhere", "prefix_each", FLOAT32),
    ("padded_anywhere", "full", FLOAT16),
])  # fmt: skip
def test_batch_invariant_bits_are_those_of_the_sequence_alone(
    lane: Lane, layout: str, mask: str, dtype: torch.dtype
) -> None:
    made = ragged(lane, layout, dtype, mask=mask, distance_radius=7, sink="float32")
    call = made.call
    together = run(call, lane, batch_invariant=True)
    for b in range(len(call.prefix) if isinstance(call.prefix, Tensor) else len(made.case.lengths[0])):
        single = alone(call, b)
        got = run(single, lane, batch_invariant=True)
        if call.cu_seqlens_q is not None:
            rows = slice(*call.cu_seqlens_q[b : b + 2].tolist())
            out, lse = together["out"][rows], together["lse"][:, rows]
        else:
            rows = slice(int(call.starts_q[b]), int(call.starts_q[b] + call.seqlens_q[b]))
            out, lse = together["out"][b : b + 1, rows], together["lse"][b : b + 1, :, rows]
        assert torch.equal(got["out"], out) and torch.equal(got["lse"], lse), f"sequence {b}"


def test_batch_invariant_bits_do_not_depend_on_the_company(lane: Lane) -> None:
    """One sequence first in a batch of 1, 2 and many: the share of each thread changes, the bits do not."""
    long, many = (40, 3) if lane.slow else (300, 9)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(many, long, 2, 64, generator=g) for _ in range(3))
    results = [run(Call(q[:n], k[:n], v[:n], right=0), lane, batch_invariant=True) for n in (1, 2, many)]
    for result in results[1:]:
        assert torch.equal(result["out"][0], results[0]["out"][0]) and torch.equal(
            result["lse"][0], results[0]["lse"][0]
        )


class TestDropout:
    SHAPE = (2, 9, 2, 16)

    def one_hot_call(self, seed: int) -> tuple[Call, Tensor]:
        """Equal scores; v and dout one-hot, so that out shows P(i, j) at (i, j), and dv shows it at (j, i)."""
        batch, rows, heads, dim = self.SHAPE
        eye = torch.eye(dim)[:rows, None].expand(batch, rows, heads, dim).contiguous()
        zeros = torch.zeros(self.SHAPE)
        lens, starts = torch.tensor([9, 5], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
        lengths = {"seqlens_q": lens, "starts_q": starts, "seqlens_k": lens, "starts_k": starts}
        return Call(zeros, zeros, eye, **lengths, right=2, dropout_p=0.4, seed=seed), eye

    @pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
    def test_every_backend_drops_the_same_in_forward_and_backward(self, lane: Lane, seed: int) -> None:
        call, dout = self.one_hot_call(seed)
        got, expected = run(call, lane, dout), run(call, Lane("reference"), dout)
        kept, kept_back = got["out"].cpu() != 0, got["dv"].cpu() != 0
        invariant = run(call, lane, batch_invariant=True)["out"].cpu() != 0
        assert torch.equal(invariant, kept)
        assert torch.equal(kept, expected["out"] != 0) and torch.equal(kept_back, expected["dv"] != 0)
        assert torch.equal(kept[0, :, :, :9], kept_back[0, :, :, :9].transpose(0, 2))
        assert 0 < kept[0].sum() < (9 * 9 - 21) * 2

    def test_a_seed_tensor_is_the_seed(self, lane: Lane) -> None:
        x = on(torch.randn(self.SHAPE), lane.device)
        by_number = da.attention(x, x, x, dropout_p=0.5, seed=-5, backend=lane.backend)
        seed = torch.tensor([-5], device=lane.device)
        assert torch.equal(da.attention(x, x, x, dropout_p=0.5, seed=seed, backend=lane.backend), by_number)
        seed += 1  # in place, as a replayed graph has it
        assert not torch.equal(da.attention(x, x, x, dropout_p=0.5, seed=seed, backend=lane.backend), by_number)

    def test_no_seed_draws_one_from_torch(self, lane: Lane) -> None:
        x = on(torch.randn(self.SHAPE), lane.device)

        def draw() -> Tensor:
            return da.attention(x, x, x, dropout_p=0.5, backend=lane.backend)

        torch.manual_seed(11)
        first, second = draw(), draw()
        torch.manual_seed(11)
        again = draw()
        assert torch.equal(first, again) and not torch.equal(first, second)
        state = torch.random.get_rng_state()
        da.attention(x, x, x, backend=lane.backend)
        assert torch.equal(torch.random.get_rng_state(), state), "without dropout nothing is drawn"

    def test_backward_drops_what_forward_dropped_when_no_seed_was_given(self, lane: Lane) -> None:
        """out is linear in v: <out, dout> = <v, dv> only with the same mask in both."""
        q, v, dout = (on(torch.randn(self.SHAPE), lane.device) for _ in range(3))
        v.requires_grad_()
        out = da.attention(q, q, v, dropout_p=0.5, backend=lane.backend)
        (dv,) = torch.autograd.grad(out, v, dout)
        torch.testing.assert_close((out * dout).sum(), (v * dv).sum(), rtol=1e-4, atol=1e-4)
