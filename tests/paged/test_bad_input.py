"""Every argument of the paged calls made wrong: an error that names it, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duplex_attn as da
import pytest
import torch
from torch.library import opcheck

BACKENDS = ["reference", "cpu"]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention() -> dict[str, Any]:
    return {
        "q": torch.randn(3, 4, 32),
        "k_pages": torch.randn(5, 4, 2, 32),
        "v_pages": torch.randn(5, 4, 2, 16),
        "block_table": torch.tensor([[4, 0], [2, 1]], dtype=torch.int32),
        "seqlens_k": int32(6, 3),
        "cu_seqlens_q": int32(0, 2, 3),
        "max_seqlen_q": 2,
    }


def append() -> dict[str, Any]:
    return {
        "k": torch.randn(3, 2, 32),
        "v": torch.randn(3, 2, 16),
        "k_pages": torch.zeros(5, 4, 2, 32),
        "v_pages": torch.zeros(5, 4, 2, 16),
        "block_table": torch.tensor([[4, 0], [2, 1]], dtype=torch.int32),
        "positions": int32(4, 5, 2),
        "cu_seqlens": int32(0, 2, 3),
    }


def copy() -> dict[str, Any]:
    return {"k_pages": torch.zeros(5, 4, 2, 32), "v_pages": torch.zeros(5, 4, 2, 16), "src": int32(0), "dst": int32(1)}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "paged_attention": (da.paged_attention, attention),
    "paged_append": (da.paged_append, append),
    "copy_pages": (da.copy_pages, copy),
}
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("paged_attention", {"q": torch.randn(3, 4, 32, dtype=torch.float64).int()}, TypeError, "q"),
    ("paged_attention", {"q": torch.randn(1, 3, 4, 32)}, ValueError, "q"),
    ("paged_attention", {"q": [1.0]}, TypeError, "q"),
    *(("paged_attention", {name: torch.nested.nested_tensor([torch.randn(3, 4, 32)], layout=layout)}, TypeError, name)
      for name in ("q", "block_table", "sink") for layout in (torch.strided, torch.jagged)),
    ("paged_attention", {"q": torch.randn(3, 3, 32)}, ValueError, "k"),
    ("paged_attention", {"q": torch.randn(3, 4, 31)}, ValueError, "k"),
    ("paged_attention", {"q": torch.randn(3, 4, 32, requires_grad=True)}, ValueError, "q"),
    *(("paged_attention", {name: None}, TypeError, name)
      for name in ("q", "k_pages", "v_pages", "block_table", "seqlens_k")),
    ("paged_attention", {"block_table": None, "mask": da.prefix_lm(1)}, TypeError, "block_table"),
    ("paged_attention", {"block_table": int32(), "mask": da.prefix_lm(1)}, ValueError, "block_table"),
    ("paged_attention", {"v_pages": torch.tensor(1.0)}, ValueError, "v_pages"),
    ("paged_attention", {"out": torch.empty(3, 4, 16, requires_grad=True)}, ValueError, "out"),
    *(("paged_attention", {name: torch.zeros(4, 1, requires_grad=True)}, ValueError, name)
      for name in ("bias", "distance_bias", "alibi_slopes", "sink", "row_distance_bias")),
    ("paged_attention", {"k_pages": torch.randn(5, 4, 2, 32).half()}, TypeError, "k_pages"),
    ("paged_attention", {"k_pages": torch.randn(5, 4, 32)}, ValueError, "k_pages"),
    ("paged_attention", {"k_pages": torch.randn(5, 4, 2, 64)[..., ::2]}, ValueError, "k_pages"),
    ("paged_attention", {"v_pages": torch.randn(4, 4, 2, 16)}, ValueError, "v_pages"),
    ("paged_attention", {"v_pages": torch.zeros(5, 4, 2, 16, dtype=torch.int8)}, TypeError, "v_pages"),
    ("paged_attention", {"block_table": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "block_table"),
    ("paged_attention", {"block_table": int32(0, 1)}, ValueError, "block_table"),
    ("paged_attention", {"block_table": torch.tensor([[4, 5], [2, 1]], dtype=torch.int32)}, ValueError, "block_table"),
    ("paged_attention", {"block_table": torch.tensor([[4, -1], [2, 1]], dtype=torch.int32)}, ValueError, "block_table"),
    ("paged_attention", {"seqlens_k": int32(9, 3)}, ValueError, "seqlens_k"),
    ("paged_attention", {"seqlens_k": int32(-1, 3)}, ValueError, "seqlens_k"),
    ("paged_attention", {"seqlens_k": int32(6, 3, 1)}, ValueError, "seqlens_k"),
    ("paged_attention", {"cu_seqlens_q": int32(0, 2, 4)}, ValueError, "cu_seqlens_q"),
    ("paged_attention", {"cu_seqlens_q": int32(1, 2, 3)}, ValueError, "cu_seqlens_q"),
    ("paged_attention", {"cu_seqlens_q": int32(0, 2, 1)}, ValueError, "cu_seqlens_q"),
    ("paged_attention", {"cu_seqlens_q": int32(0, 3)}, ValueError, "cu_seqlens_q"),
    ("paged_attention", {"cu_seqlens_q": None}, ValueError, "q"),
    ("paged_attention", {"max_seqlen_q": 1}, ValueError, "max_seqlen_q"),
    ("paged_attention", {"max_seqlen_q": None}, TypeError, "max_seqlen_q"),
    ("paged_attention", {"mask": "causal"}, TypeError, "mask"),
    ("paged_attention", {"mask": da.prefix_lm(int32(1))}, ValueError, "prefix"),
    ("paged_attention", {"k_scales": torch.ones(1, 1, 1)}, ValueError, "k_scales"),
    ("paged_attention", {"rope_cos": torch.ones(9, 4)}, ValueError, "rope_sin"),
    ("paged_attention", {"rope_cos": torch.ones(9, 17), "rope_sin": torch.ones(9, 17)}, ValueError, "rope_cos"),
    ("paged_attention", {"rope_cos": torch.ones(5, 4), "rope_sin": torch.ones(5, 4)}, ValueError, "seqlens_k"),
    ("paged_attention", {"bias": torch.zeros(2, 4, 3, 8)}, ValueError, "bias"),
    ("paged_attention", {"distance_bias": torch.zeros(4, 4)}, ValueError, "distance_bias"),
    ("paged_attention", {"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes"),
    ("paged_attention", {"sink": torch.zeros(4, dtype=torch.int32)}, TypeError, "sink"),
    ("paged_attention", {"scale": float("nan")}, ValueError, "scale"),
    ("paged_attention", {"softcap": -1.0}, ValueError, "softcap"),
    *(("paged_attention", {name: torch.tensor(0.3)}, TypeError, name) for name in ("scale", "softcap")),
    ("paged_attention", {"out": torch.empty(3, 4, 15)}, ValueError, "out"),
    ("paged_attention", {"out": torch.empty(3, 4, 16).half()}, TypeError, "out"),
    ("paged_attention", {"out": torch.empty(3, 1, 16).expand(3, 4, 16)}, ValueError, "out"),
    ("paged_attention", {"plan": torch.zeros(3, 7, dtype=torch.int32)}, ValueError, "plan"),
    ("paged_attention", {"backend": "cudnn"}, ValueError, "backend"),
    *(("paged_append", {name: None}, TypeError, name) for name in ("k", "v", "k_pages", "block_table", "positions")),
    ("paged_append", {"k": torch.randn(3, 1, 32)}, ValueError, "k"),
    ("paged_append", {"k": torch.randn(3, 2, 32, requires_grad=True)}, ValueError, "k"),
    ("paged_append", {"v": torch.randn(3, 2, 16, requires_grad=True)}, ValueError, "v"),
    ("paged_append", {"v": torch.randn(3, 2, 15)}, ValueError, "v"),
    ("paged_append", {"v": torch.randn(3, 2, 16).half()}, TypeError, "v"),
    ("paged_append", {"positions": int32(4, 5)}, ValueError, "positions"),
    ("paged_append", {"positions": int32(4, 8, 2)}, ValueError, "positions"),
    ("paged_append", {"positions": int32(4, -2, 2)}, ValueError, "positions"),
    ("paged_append", {"positions": int32(4, 4, 2)}, ValueError, "positions"),
    ("paged_append", {"block_table": torch.tensor([[4, 5], [2, 1]], dtype=torch.int32)}, ValueError, "block_table"),
    ("paged_append", {"block_table": torch.tensor([[4, 2], [2, 1]], dtype=torch.int32), "positions": int32(4, 5, 0)},
     ValueError, "positions"),
    ("paged_append", {"cu_seqlens": int32(0, 2, 9)}, ValueError, "cu_seqlens"),
    ("paged_append", {"cu_seqlens": None}, ValueError, "k"),
    ("paged_append", {"rope_cos": torch.ones(5, 4), "rope_sin": torch.ones(5, 4)}, ValueError, "positions"),
    ("paged_append", {"k_pages": torch.zeros(5, 4, 2, 32, dtype=torch.int8),
                      "v_pages": torch.zeros(5, 4, 2, 16, dtype=torch.int8)}, ValueError, "k_scales"),
    *(("paged_append", {"k_pages": torch.zeros(5, 4, 2, 32, dtype=torch.int8),
                        "v_pages": torch.zeros(5, 4, 2, 16, dtype=torch.int8),
                        "k_scales": torch.zeros(5, 4, 2), "v_scales": torch.zeros(5, 4, 2),
                        name: torch.full((1, 1, 1), 0.5).expand(5, 4, 2)}, ValueError, name)
      for name in ("k_scales", "v_scales")),
    *(("copy_pages", {name: None}, TypeError, name) for name in ("k_pages", "v_pages", "src", "dst")),
    ("paged_append", {"k_pages": torch.zeros(1, 4, 2, 32).expand(5, 4, 2, 32)}, ValueError, "k_pages"),
    ("copy_pages", {"v_pages": torch.zeros(1, 4, 2, 16).expand(5, 4, 2, 16)}, ValueError, "v_pages"),
    ("copy_pages", {"src": int32(5)}, ValueError, "src"),
    ("copy_pages", {"dst": int32(-1)}, ValueError, "dst"),
    ("copy_pages", {"src": int32(0, 1), "dst": int32(2, 2)}, ValueError, "dst"),
    ("copy_pages", {"src": int32(0, 1), "dst": int32(2, 0)}, ValueError, "dst"),
    ("copy_pages", {"dst": int32(1, 2)}, ValueError, "dst"),
    ("copy_pages", {"v_pages": torch.zeros(4, 4, 2, 16)}, ValueError, "v_pages"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("call", "change", "kind", "name"), WRONG, ids=lambda x: "-".join(x) if isinstance(x, dict) else ""
)
def test_wrong_argument(call: str, change: dict[str, Any], kind: type[Exception], name: str, backend: str) -> None:
    function, make = CALLS[call]
    arguments = {"backend": backend} | make() | change
    written = [x for key, x in arguments.items() if "pages" in key]
    before = [x if x is None else x.clone() for x in written]
    with pytest.raises(kind, match=rf"^{name}: expected"):
        function(**arguments)
    assert all(x is was or torch.equal(x, was) for x, was in zip(written, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend: str) -> None:
    given = attention()
    out, lse = torch.empty(3, 4, 16), torch.empty(4, 3)
    opcheck(torch.ops.duplex_attn.paged_attention.default, (
        *list(given.values())[:7], int32(1, 0), None, 0, False, None, torch.randn(4, 3), torch.rand(4), None, None,
        torch.rand(4), None, None, torch.rand(8, 4), torch.rand(8, 4), False, None, 0.0, False, None, out, lse, backend,
    ))  # fmt: skip
    given = append()
    opcheck(torch.ops.duplex_attn.paged_append.default, (*given.values(), None, None, False, None, None, backend))
    opcheck(torch.ops.duplex_attn.copy_pages.default, (*copy().values(), None, None, backend))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_what_is_written(backend: str, inference: bool) -> None:
    """What saved it for backward raises instead of taking the new numbers for the old."""
    with torch.inference_mode(inference):
        read, new, pages = attention(), append(), copy()
        out = torch.empty(3, 4, 16)
        da.paged_attention(**read, out=out, backend=backend)
        da.paged_append(**new, backend=backend)
        da.copy_pages(**pages, backend=backend)
    written = (out, new["k_pages"], new["v_pages"], pages["k_pages"], pages["v_pages"])
    if not inference:  # inference tensors have no versions
        assert all(x._version > 0 for x in written)
        assert read["k_pages"]._version == new["k"]._version == 0


def test_under_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    given = attention()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(k, v, q, k_pages, v_pages, table, lengths, cu, positions):
        da.paged_append(k, v, k_pages, v_pages, table, positions, cu)
        return da.paged_attention(q * 2, k_pages, v_pages, table, lengths, cu_seqlens_q=cu, max_seqlen_q=2)

    pages = [given["k_pages"].clone(), given["v_pages"].clone()]
    new = append()
    rest = (given["block_table"], given["seqlens_k"], given["cu_seqlens_q"], new["positions"])
    got = step(new["k"], new["v"], given["q"], *pages, *rest)
    da.paged_append(new["k"], new["v"], given["k_pages"], given["v_pages"], rest[0], rest[3], rest[2])
    assert torch.equal(pages[0], given["k_pages"]) and torch.equal(pages[1], given["v_pages"])
    given["q"] = given["q"] * 2
    assert torch.equal(got, da.paged_attention(**given))
