"""The oracle itself: against scalar arithmetic written straight from docs/semantics.md, and Philox against its published answers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ..oracle import Answer, Call, answer, assert_accurate, dropout_keeps, floors, philox_4x32_10


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123, tests/kat_vectors, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, words: str) -> None:
    def numbers(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = numbers(key)
    got = philox_4x32_10(high << 32 | low, np.array(numbers(counter), np.uint32))
    assert got.tolist() == numbers(words)


def test_dropout_reads_word_j_mod_4_of_the_counter_j_div_4() -> None:
    seed, p, batch, head = -3, 0.4, 2, 5
    keeps = dropout_keeps(seed, p, batch, head, 3, 7)
    for i in range(3):
        for j in range(7):
            word = philox_4x32_10(seed % 2**64, np.array([j // 4, i, head, batch], np.uint32))[j % 4]
            assert bool(keeps[i, j]) == (int(word) >= math.floor(p * 2**32))
    assert abs(dropout_keeps(11, 0.3, 0, 0, 400, 400).double().mean() - 0.7) < 5e-3


def general_call(align: str, sink: bool) -> Call:
    """Two padded sequences with every term of a score at once; the padding holds NaN."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    call = Call(normal(2, 5, 4, 3), normal(2, 6, 2, 3), normal(2, 6, 2, 2))
    call.seqlens_q, call.starts_q = torch.tensor([4, 2]), torch.tensor([1, 0])
    call.seqlens_k, call.starts_k = torch.tensor([3, 6]), torch.tensor([2, 0])
    call.prefix, call.left, call.right, call.top_left = torch.tensor([1, 0]), 1, 1, align == "top_left"
    call.bias = normal(2, 1, 5, 6)
    call.bias[1, 0, 1] = -math.inf
    call.distance_bias, call.alibi_slopes = normal(4, 5), normal(4).abs()
    call.row_distance_bias, call.col_distance_bias = normal(2, 4, 5, 3), normal(2, 4, 6, 3)
    call.sink = normal(4) if sink else None
    call.scale, call.softcap, call.dropout_p, call.seed = 0.7, 2.0, 0.3, 2**40 + 9
    for x, starts, lens in (
        (call.q, call.starts_q, call.seqlens_q),
        (call.k, call.starts_k, call.seqlens_k),
        (call.v, call.starts_k, call.seqlens_k),
    ):
        for b in range(2):
            x[b, : starts[b]] = x[b, starts[b] + lens[b] :] = math.nan
    return call


def by_hand(call: Call, b: int, h: int, i: int) -> tuple[list[float], float]:
    """Row i of sequence b, head h, from docs/semantics.md in scalar arithmetic."""
    len_q, len_k = int(call.seqlens_q[b]), int(call.seqlens_k[b])
    start_q, start_k = int(call.starts_q[b]), int(call.starts_k[b])
    p = i if call.top_left else i + len_k - len_q
    kv = h // 2
    exps, dropped = [], []
    for j in range(len_k):
        if not (j < int(call.prefix[b]) or p - call.left <= j <= p + call.right):
            continue
        s = (
            sum(float(call.q[b, start_q + i, h, d]) * float(call.k[b, start_k + j, kv, d]) for d in range(3))
            * call.scale
        )
        s = call.softcap * math.tanh(s / call.softcap)
        s += float(call.distance_bias[h, max(-2, min(2, j - p)) + 2])
        s += float(call.row_distance_bias[b, h, i, max(-1, min(1, j - p)) + 1])
        s += float(call.col_distance_bias[b, h, j, max(-1, min(1, j - p)) + 1])
        s -= float(call.alibi_slopes[h]) * abs(j - p)
        s += float(call.bias[b, 0, start_q + i, start_k + j])
        word = philox_4x32_10(call.seed, np.array([j // 4, i, h, b], np.uint32))[j % 4]
        exps.append((j, math.exp(s)))
        dropped.append(int(word) < math.floor(call.dropout_p * 2**32))
    total = sum(e for _, e in exps) + (math.exp(float(call.sink[h])) if call.sink is not None else 0.0)
    if total == 0:
        return [0.0, 0.0], -math.inf
    out = [
        sum(
            e / total * (not drop) / (1 - call.dropout_p) * float(call.v[b, start_k + j, kv, d])
            for (j, e), drop in zip(exps, dropped, strict=True)
        )
        for d in (0, 1)
    ]
    return out, math.log(total)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_oracle_is_the_design_in_scalar_arithmetic(align: str, sink: bool) -> None:
    call = general_call(align, sink)
    got = answer(call, torch.float64)
    out, lse = torch.zeros(2, 5, 4, 2, dtype=torch.float64), torch.full((2, 4, 5), -math.inf, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(int(call.seqlens_q[b])):
                row = int(call.starts_q[b]) + i
                values, lse[b, h, row] = by_hand(call, b, h, i)
                out[b, row, h] = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(got["out"], out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got["lse"], lse, rtol=1e-12, atol=1e-13)
    assert not sink or got["lse"][1, 0, 1] == call.sink[0], "a row that its bias hides has the sink alone"


def test_oracle_gradients_are_the_finite_differences_of_its_outputs() -> None:
    call = general_call("bottom_right", sink=True)
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(2, 5, 4, 2, generator=g, dtype=torch.float64)
    dlse = torch.randn(2, 4, 5, generator=g, dtype=torch.float64)
    grads = answer(call, torch.float64, dout, dlse)

    def loss() -> float:
        got = answer(call, torch.float64)
        return float((got["out"] * dout).sum() + (torch.where(got["lse"].isfinite(), got["lse"], 0) * dlse).sum())

    for name in ("q", "k", "v", "bias", "distance_bias", "row_distance_bias", "col_distance_bias", "sink"):
        x, grad = getattr(call, name), grads[f"d{name}"]
        assert grad.isfinite().all()
        flat = x.view(-1)
        for n in torch.nonzero(flat.isfinite())[:, 0][:: max(1, x.numel() // 12)].tolist():
            kept, step = float(flat[n]), 1e-6
            flat[n] = kept + step
            high = loss()
            flat[n] = kept - step
            low = loss()
            flat[n] = kept
            assert abs((high - low) / (2 * step) - float(grad.view(-1)[n])) < 1e-7, (name, n)


@pytest.mark.parametrize("causal", [False, True])
def test_oracle_agrees_with_torch(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8, dtype=torch.float64).unbind()
    got = answer(Call(q, k, v, right=0 if causal else None), torch.float64)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    torch.testing.assert_close(got["out"], want.transpose(1, 2))


def test_packed_is_dense_sequence_by_sequence() -> None:
    lens_q, lens_k = [3, 0, 5], [4, 2, 5]
    q, k, v = torch.randn(9, 2, 8), torch.randn(12, 1, 8), torch.randn(12, 1, 8)  # one row more than the sequences have
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)) for x in (lens_q, lens_k))
    packed = answer(Call(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, right=0), torch.float64)
    for b in (0, 2):
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        dense = answer(Call(q[None, rows], k[None, cols], v[None, cols], right=0), torch.float64)
        assert torch.equal(packed["out"][rows], dense["out"][0]) and torch.equal(
            packed["lse"][:, rows], dense["lse"][0]
        )
    assert (packed["out"][8] == 0).all() and (packed["lse"][:, 8] == -math.inf).all()


@pytest.mark.parametrize("damage", ["error", "nan", "lse of a hidden row", "shape"])
def test_the_contract_notices(damage: str) -> None:
    q, k, v = torch.randn(3, 1, 4, 1, 8).unbind()
    call = Call(q, k, v, left=0, right=0, seqlens_k=torch.tensor([2]))
    exact, plain = answer(call, torch.float64), answer(call, torch.float32)
    assert_accurate(plain, exact, plain, floors(call, exact))
    bad: Answer = {name: x.clone() for name, x in plain.items()}
    if damage == "error":
        bad["out"][0, 2, 0, 3] += 1e-4
    elif damage == "nan":
        bad["out"][0, 0, 0, 1] = math.nan
    elif damage == "lse of a hidden row":
        bad["lse"][0, 0, 0] = -1e30
    else:
        bad["out"] = bad["out"][0]
    with pytest.raises(AssertionError, match="lse" if "lse" in damage else "out"):
        assert_accurate(bad, exact, plain, floors(call, exact))
