"""merge_attention is the exact union of attentions over disjoint keys: outputs, lse and, through both, every gradient."""

import dataclasses
import math

import duplex_attn as da
import pytest
import torch

from ..cases import Case, covering, problem
from ..lanes import Lane, on
from ..oracle import assert_accurate

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


CHOICES = {
    "layout": ["dense", "packed"],
    "cuts": [(40,), (0, 7, 7, 60), ()],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "sink": ["none", "float32"],
}
PAIRS = covering(CHOICES)


@pytest.mark.parametrize("sink", CHOICES["sink"])
@pytest.mark.parametrize("dtype", CHOICES["dtype"])
@pytest.mark.parametrize("cuts", CHOICES["cuts"])
@pytest.mark.parametrize("layout", CHOICES["layout"])
def test_attention_over_parts_of_the_keys_merges_to_attention_over_all(
    lane: Lane, layout: str, cuts: tuple, dtype: torch.dtype, sink: str
) -> None:
    if lane.slow and {"layout": layout, "cuts": cuts, "dtype": dtype, "sink": sink} not in PAIRS:
        pytest.skip("the interpreter runs as many as hold every pair of choices")
    packed = layout == "packed"
    lengths = ((50,), (70,)) if packed else ((20, 20), (70, 70))
    made = problem(Case(layout, lengths, (4, 2), (40, 24), dtype, sink=sink))
    call = dataclasses.replace(
        made.call, **{n: on(x, lane.device) for n, x in vars(made.call).items() if isinstance(x, torch.Tensor)}
    )
    dout, dlse = on(made.dout, lane.device), on(made.dlse, lane.device)
    q, k, v = (x.detach().requires_grad_() for x in (call.q, call.k, call.v))
    sink_leaf = None if call.sink is None else call.sink.detach().requires_grad_()
    outs, lses = [], []
    for n, (first, last) in enumerate(zip((0, *cuts), (*cuts, 70), strict=True)):
        part = slice(first, last) if packed else (slice(None), slice(first, last))
        options = {
            "return_lse": True,
            "backend": lane.backend,
            "deterministic": True,
            "sink": sink_leaf if n == 0 else None,
        }  # counted once
        if packed:
            cu_k = torch.tensor([0, last - first], dtype=torch.int32, device=lane.device)
            out, lse = da.varlen_attention(q, k[part], v[part], call.cu_seqlens_q, cu_k, 50, last - first, **options)
        else:
            out, lse = da.attention(q, k[part], v[part], **options)
        outs.append(out)
        lses.append(lse)
    out, lse = da.merge_attention(outs, lses, backend=lane.backend)
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if sink_leaf is None else {"dsink": sink_leaf})
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    got = {"out": out, "lse": lse} | dict(zip(leaves, grads, strict=True))
    exact, plain, floor = made.answers(gradients=True)
    # Each part is rounded to the dtype before it is merged, and so is its gradient.
    assert_accurate(got, exact, plain, {name: (1 + len(cuts)) * x for name, x in floor.items()}, f"{lane}")
    assert out.dtype == dtype and lse.dtype == torch.float32


def test_parts_that_see_nothing_count_for_nothing(lane: Lane) -> None:
    out, lse = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 3)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    lse[0, 1, 2], out[0, 2, 1] = -math.inf, 0
    parts = [(nothing, never), (out, lse), (nothing, never)]
    outs, lses = ([on(x, lane.device).requires_grad_() for x in xs] for xs in zip(*parts, strict=True))
    merged, merged_lse = da.merge_attention(outs, lses, backend=lane.backend)
    assert torch.equal(merged.cpu(), out) and torch.equal(merged_lse.cpu(), lse)
    seen = lse.isfinite()
    loss = merged.sum() + merged_lse[seen.to(lane.device)].sum()
    for grad in torch.autograd.grad(loss, [*outs, *lses]):
        assert grad.isfinite().all()


def test_merge_survives_the_largest_exponents(lane: Lane) -> None:
    outs = [torch.ones(1, 1, 1, 8, device=lane.device), 3 * torch.ones(1, 1, 1, 8, device=lane.device)]
    for a, b, want in ((300.0, 300.0, 2.0), (-300.0, -300.0, 2.0), (1e4, -1e4, 1.0), (-1e4, 1e4, 3.0)):
        lses = [torch.full((1, 1, 1), x, device=lane.device) for x in (a, b)]
        out, lse = da.merge_attention(outs, lses, backend=lane.backend)
        assert torch.allclose(out, torch.full_like(out, want), rtol=1e-6)
        assert float(lse) == pytest.approx(max(a, b) + (math.log(2) if a == b else 0), rel=1e-6)
