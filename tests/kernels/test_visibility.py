"""Exactly which keys a query uses, with no tolerance: v and dout hold one-hot rows, so out and dv spell out dropout(P)."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..lanes import Lane, run
from ..oracle import Call, dropout_keeps, sequences, visible

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")
WIDTH = 256  # head_dim of v: column j % WIDTH shows key j

distances = st.one_of(st.none(), st.integers(0, 5), st.integers(0, 200))
lengths = st.one_of(st.integers(0, 20), st.integers(0, 200), st.sampled_from([1, 16, 32, 63, 64, 65, 127, 128, 129]))


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[int], list[int], list[int] | int, int | None, int | None, bool]:
    batch = draw(st.integers(1, 3))
    lens = st.lists(lengths, min_size=batch, max_size=batch)
    prefix = draw(
        st.one_of(st.just(0), st.integers(0, 200), st.lists(st.integers(-3, 210), min_size=batch, max_size=batch))
    )
    return draw(lens), draw(lens), prefix, draw(distances), draw(distances), draw(st.booleans())


def one_hot(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(WIDTH, dtype=dtype)[torch.arange(rows) % WIDTH]


def packed_call(lens_q: list[int], lens_k: list[int], dtype: torch.dtype, heads: int = 2) -> tuple[Call, torch.Tensor]:
    """All scores equal, v and dout one-hot by the row within the sequence."""
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32) for lens in (lens_q, lens_k))
    v, dout = (
        torch.cat([one_hot(n, dtype) for n in lens])[:, None].expand(-1, heads, -1).contiguous()
        for lens in (lens_k, lens_q)
    )
    q, k = torch.zeros(sum(lens_q), heads, 8, dtype=dtype), torch.ones(sum(lens_k), heads, 8, dtype=dtype)
    return Call(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), dout


def check(call: Call, dout: torch.Tensor, lane: Lane) -> None:
    got = run(call, lane, dout, deterministic=True)
    out, lse, dv = (got[name].cpu() for name in ("out", "lse", "dv"))
    for seq in sequences(call):
        seen = visible(call, seq.batch, seq.len_q, seq.len_k)
        count = seen.sum(1)
        for head in range(call.heads_q):
            kept = seen
            if call.dropout_p > 0:
                kept = seen & dropout_keeps(call.seed, call.dropout_p, seq.batch, head, seq.len_q, seq.len_k)
            # (len_q, len_k): which column of out, and of dv, shows the pair. A window never holds two keys of one column.
            shown = (
                out[seq.q][:, head].gather(1, (torch.arange(seq.len_k) % WIDTH).expand(seq.len_q, -1))
                if seq.len_q
                else kept
            )
            back = (
                dv[seq.k][:, head].gather(1, (torch.arange(seq.len_q) % WIDTH).expand(seq.len_k, -1)).T
                if seq.len_k
                else kept
            )
            assert torch.equal((shown != 0) & seen, kept), (
                f"out uses other keys than the span and dropout leave, head {head}, {seq}"
            )
            assert torch.equal((back != 0) & seen, kept), (
                f"dv of sequence {seq.batch}, head {head} comes from other pairs, {seq}"
            )
            if seq.len_k <= WIDTH and seq.len_q <= WIDTH:
                assert torch.equal(shown != 0, kept) and torch.equal(back != 0, kept)
            torch.testing.assert_close(lse[head][seq.q], count.double().log().float(), atol=2e-6, rtol=2e-6)


def test_span_and_dropout(lane: Lane) -> None:
    @given(
        spans(),
        st.sampled_from([0.0, 0.0, 0.1, 0.9]),
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    @settings(max_examples=lane.examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check_span(span: tuple, p: float, seed: int, dtype: torch.dtype) -> None:
        lens_q, lens_k, prefix, left, right, top_left = span
        call, dout = packed_call(lens_q, lens_k, dtype)
        call.prefix = prefix if isinstance(prefix, int) else torch.tensor(prefix, dtype=torch.int32)
        call.left, call.right, call.top_left, call.dropout_p, call.seed = left, right, top_left, p, seed
        check(call, dout, lane)

    check_span()


def test_far_from_the_start(lane: Lane) -> None:
    """Positions, tables and counters thousands of rows in; the window and the prefix keep the columns apart."""
    call, dout = packed_call([300], [1500], torch.float32, heads=1)
    call.left, call.right, call.dropout_p, call.seed = 150, 20, 0.3, -7
    check(call, dout, lane)
    call.top_left, call.left, call.right = True, 20, 150
    check(call, dout, lane)


@pytest.mark.parametrize("top_left", [False, True])
@pytest.mark.parametrize(("len_q", "len_k"), [(3, 7), (7, 3), (1, 5)])
def test_causal_alignment_is_the_one_asked_for(lane: Lane, len_q: int, len_k: int, top_left: bool) -> None:
    """bottom_right: the last query sees the last key. top_left: query 0 sees key 0 alone, as torch's is_causal."""
    call, dout = packed_call([len_q], [len_k], torch.float32, heads=1)
    call.right, call.top_left = 0, top_left
    out = run(call, lane)["out"].cpu()
    torch_says = torch.ones(len_q, len_k).tril(0 if top_left else len_k - len_q).bool()
    assert torch.equal(out[:, 0, :len_k] > 0, torch_says)
    if top_left:
        q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
        torch.testing.assert_close(
            out.transpose(0, 1)[None], torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        )


def test_a_hidden_row_is_zero_and_minus_infinity_and_has_no_gradient(lane: Lane) -> None:
    call, _ = packed_call([5], [2], torch.float32, heads=1)
    call.q = torch.randn(5, 1, 8)
    call.right = 0  # queries 0 to 2 stand before the first key
    got = run(call, lane, torch.randn(5, 1, WIDTH), torch.randn(1, 5), deterministic=True)
    assert (got["out"][:3] == 0).all() and (got["lse"][0, :3] == -math.inf).all() and (got["dq"][:3] == 0).all()
    assert (got["out"][3:] != 0).any() and all(x.isfinite().all() for name, x in got.items() if name != "lse")
    call.sink = torch.tensor([0.7])
    got = run(call, lane, torch.randn(5, 1, WIDTH), torch.ones(1, 5), deterministic=True)
    assert (got["out"][:3] == 0).all() and (got["lse"][0, :3].cpu() == call.sink).all() and (got["dq"][:3] == 0).all()
    assert float(got["dsink"]) >= 3  # the three rows' lse is the sink
