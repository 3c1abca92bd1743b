"""A wrong argument raises ValueError or TypeError that names it, says what was expected and what came, before any kernel runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import duplex_attn as da
import numpy as np
import pytest
import torch
from duplex_attn.backends import BACKENDS
from torch import Tensor

from .calls import BATCH, HEADS, HEADS_KV, SEQLEN_K, SEQLEN_Q, int32, leaf

DIM, TOTAL_Q, TOTAL_K = 8, 6, 8
OUTS, LSES = [leaf(BATCH, SEQLEN_Q, HEADS, DIM) for _ in range(2)], [leaf(BATCH, HEADS, SEQLEN_Q) for _ in range(2)]
DENSE: dict[str, Any] = {
    "q": leaf(BATCH, SEQLEN_Q, HEADS, DIM),
    "k": leaf(BATCH, SEQLEN_K, HEADS_KV, DIM),
    "v": leaf(BATCH, SEQLEN_K, HEADS_KV, DIM),
}
PACKED: dict[str, Any] = {
    "q": leaf(TOTAL_Q, HEADS, DIM),
    "k": leaf(TOTAL_K, HEADS_KV, DIM),
    "v": leaf(TOTAL_K, HEADS_KV, DIM),
    "cu_seqlens_q": int32(0, 3, 3, 5),
    "cu_seqlens_k": int32(0, 2, 5, 8),
    "max_seqlen_q": 4,
    "max_seqlen_k": 3,
}
MERGE: dict[str, Any] = {"outs": OUTS, "lses": LSES}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([zeros(rows, HEADS, DIM) for rows in (3, 5)], layout=layout)


# What is changed in a good call, the error, how its message begins and what it says came.
Bad = tuple[dict[str, Any], type[Exception], str, str]

BAD_IN_BOTH: list[Bad] = [
    *(({name: wrong}, TypeError, f"{name}: expected a tensor", type(wrong).__name__)
      for name in ("q", "k", "v", "bias", "distance_bias", "alibi_slopes", "sink") for wrong in ([1.0], 2)),
    *(({name: None}, TypeError, f"{name}: expected a tensor", "NoneType") for name in ("q", "k", "v")),
    *(({name: nested(layout)}, TypeError, f"{name}: expected a strided tensor", "a nested one")
      for name in ("q", "k", "v", "bias", "distance_bias", "alibi_slopes", "sink")
      for layout in (torch.strided, torch.jagged)),
    *(({name: 2.0}, TypeError, f"{name}: expected Optional[Tensor]", "float")
      for name in ("row_distance_bias", "col_distance_bias")),
    *(({name: zeros(dtype=dtype)}, TypeError, f"{name}: expected ", str(dtype))
      for name in ("distance_bias", "alibi_slopes", "sink") for dtype in (torch.int32, torch.bool, torch.complex64)),
    *(({name: torch.tensor(1.0)}, ValueError, f"{name}: expected ", "()")
      for name in ("q", "k", "v", "distance_bias", "alibi_slopes", "row_distance_bias", "col_distance_bias", "sink")),
    ({"bias": zeros(1, 1, 1, 1, 1)}, ValueError, "bias: expected a shape that broadcasts to", "(1, 1, 1, 1, 1)"),
    *(({"bias": zeros(1, 1, dtype=dtype)}, TypeError, "bias: expected bool, float32, float16 or bfloat16", str(dtype))
      for dtype in (torch.int64, torch.float64, torch.complex64)),
    ({"distance_bias": zeros(HEADS, 4)}, ValueError, "distance_bias: expected shape (4, 2R + 1)", "(4, 4)"),
    ({"distance_bias": zeros(HEADS, 0)}, ValueError, "distance_bias: expected shape (4, 2R + 1)", "(4, 0)"),
    ({"distance_bias": zeros(1, 5)}, ValueError, "distance_bias: expected shape (4, 2R + 1)", "(1, 5)"),
    ({"alibi_slopes": zeros(1)}, ValueError, "alibi_slopes: expected shape (heads,) = (4,)", "(1,)"),
    ({"alibi_slopes": zeros(BATCH, HEADS)}, ValueError, "alibi_slopes: expected shape (heads,) = (4,)", "(2, 4)"),
    ({"sink": zeros(HEADS_KV)}, ValueError, "sink: expected shape (heads,) = (4,)", "(2,)"),
    ({"row_distance_bias": zeros(1, HEADS, 5, 3)}, ValueError, "row_distance_bias: expected shape", "(1, 4, 5, 3)"),
    ({"col_distance_bias": zeros(1, HEADS, 5, 3)}, ValueError, "col_distance_bias: expected shape", "(1, 4, 5, 3)"),
    *(({name: meta(1, 1)}, ValueError, f"{name}: expected q's device cpu", "meta")
      for name in ("bias", "distance_bias", "row_distance_bias", "col_distance_bias")),
    *(({name: meta(HEADS)}, ValueError, f"{name}: expected q's device cpu", "meta") for name in ("alibi_slopes", "sink")),
    *(({"scale": x}, ValueError, "scale: expected a finite number", str(x))
      for x in (math.nan, math.inf, -math.inf, 1e39)),
    ({"scale": "1"}, TypeError, "scale: expected Optional[float]", "str"),
    *(({name: kind(torch.tensor(0.3))}, TypeError, f"{name}: expected a float", kind.__name__)
      for name in ("scale", "softcap", "dropout_p") for kind in (torch.Tensor, torch.nn.Parameter)),
    *(({"softcap": x}, ValueError, "softcap: expected 0 for none, or a positive finite number", str(x))
      for x in (-1.0, math.nan, math.inf, 1e39, 1e-46)),
    ({"softcap": None}, TypeError, "softcap: expected float", "NoneType"),
    *(({"dropout_p": x, "seed": 1}, ValueError, "dropout_p: expected 0 <= dropout_p < 1", str(x))
      for x in (-0.1, 1.0, 1.5, math.nan)),
    *(({"dropout_p": x}, ValueError, "dropout_p: expected 0 <= dropout_p < 1", str(x)) for x in (1.0, math.nan)),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected float", "str"),
    *(({"dropout_p": 0.5, "seed": x}, TypeError, "seed: expected an int or an int64 tensor (1,)", type(x).__name__)
      for x in (1.5, "1", [1])),
    *(({"dropout_p": 0.5, "seed": x}, ValueError, "seed: expected a 64-bit integer", str(x)) for x in (2**63, -(2**63) - 1)),
    ({"dropout_p": 0.5, "seed": int32(1)}, TypeError, "seed: expected int64", "torch.int32"),
    ({"dropout_p": 0.5, "seed": zeros(1)}, TypeError, "seed: expected int64", "torch.float32"),
    ({"dropout_p": 0.5, "seed": torch.tensor(1)}, ValueError, "seed: expected shape (1,)", "()"),
    ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, ValueError, "seed: expected shape (1,)", "(2,)"),
    ({"dropout_p": 0.5, "seed": meta(1, dtype=torch.int64)}, ValueError, "seed: expected q's device cpu", "meta"),
    *(({"mask": x}, TypeError, "mask: expected a Mask", type(x).__name__)
      for x in (None, "causal", True, (0, None, 0, "bottom_right"), zeros(5, 7, dtype=torch.bool))),
    ({"mask": da.Mask(align="left")}, ValueError, 'mask: expected align "bottom_right" or "top_left"', "left"),
    *(({"mask": da.prefix_lm(x)}, TypeError, "prefix: expected an int or an int32 tensor (batch,)", type(x).__name__)
      for x in (1.5, "3", None, [1, 2])),
    ({"mask": da.prefix_lm(torch.tensor([1, 2]))}, TypeError, "prefix: expected int32", "torch.int64"),
    ({"mask": da.prefix_lm(zeros(2))}, TypeError, "prefix: expected int32", "torch.float32"),
    ({"mask": da.prefix_lm(torch.tensor(3, dtype=torch.int32))}, ValueError, "prefix: expected shape (batch,)", "()"),
    ({"mask": da.prefix_lm(int32(1))}, ValueError, "prefix: expected shape (batch,)", "(1,)"),
    ({"mask": da.prefix_lm(meta(2, dtype=torch.int32))}, ValueError, "prefix: expected q's device cpu", "meta"),
    *(({"mask": da.Mask(**{side: x})}, TypeError, f"{side}: expected Optional[int]", type(x).__name__)
      for side in ("left", "right") for x in (1.5, "3", int32(1, 2))),
    *(({"mask": da.Mask(**{side: 2**30 + 1})}, ValueError, f"{side}: expected a distance of at most", str(2**30 + 1))
      for side in ("left", "right")),
    ({"deterministic": "yes"}, TypeError, "deterministic: expected bool", "str"),
    ({"batch_invariant": "yes"}, TypeError, "batch_invariant: expected bool", "str"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of cpu, triton, cuda, reference", "gpu"),
    ({"backend": 1}, TypeError, "backend: expected str", "int"),
]  # fmt: skip

BAD_DENSE: list[Bad] = [
    *(({name: zeros(7, HEADS, DIM)}, ValueError, f"{name}: expected (batch, seqlen, heads, head_dim)", "(7, 4, 8)")
      for name in ("q", "k", "v")),
    *(({name: DENSE[name].detach().half()}, TypeError, f"{other}: expected q's dtype", str(torch.float32 if name == "q" else torch.float16))
      for name, other in (("q", "k"), ("k", "k"), ("v", "v"))),
    *(({name: DENSE[name].detach().to(dtype) for name in DENSE}, TypeError, "q: expected float32, float16 or bfloat16", str(dtype))
      for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    *(({name: meta(*DENSE[name].shape)}, ValueError, f"{other}: expected q's device", "cpu" if name == "q" else "meta")
      for name, other in (("q", "k"), ("k", "k"), ("v", "v"))),
    *(({name: DENSE[name].detach().to_sparse()}, TypeError, "q, k, v: expected strided tensors", "torch.sparse_coo")
      for name in ("q", "k", "v")),
    ({"k": zeros(1, SEQLEN_K, HEADS_KV, DIM)}, ValueError, "k: expected q's batch (2)", "1"),
    ({"v": zeros(1, SEQLEN_K, HEADS_KV, DIM)}, ValueError, "v: expected q's batch (2)", "1"),
    ({"v": zeros(BATCH, 6, HEADS_KV, DIM)}, ValueError, "v: expected k's rows (7)", "6"),
    ({"k": zeros(BATCH, SEQLEN_K, 3, DIM)}, ValueError, "k: expected heads_q (4) to be a multiple of heads_kv", "3"),
    ({"k": zeros(BATCH, SEQLEN_K, 8, DIM)}, ValueError, "k: expected heads_q (4) to be a multiple of heads_kv", "8"),
    ({"k": zeros(BATCH, SEQLEN_K, 0, DIM)}, ValueError, "k: expected heads_q (4) to be a multiple of heads_kv", "0"),
    ({"v": zeros(BATCH, SEQLEN_K, HEADS, DIM)}, ValueError, "v: expected k's heads (2)", "4"),
    ({"q": zeros(BATCH, SEQLEN_Q, 0, DIM)}, ValueError, "q: expected at least one head", "0"),
    ({"k": zeros(BATCH, SEQLEN_K, HEADS_KV, 16)}, ValueError, "k: expected q's head_dim (8)", "16"),
    *(({"q": zeros(BATCH, SEQLEN_Q, HEADS, n), "k": zeros(BATCH, SEQLEN_K, HEADS_KV, n)}, ValueError, "q: expected head_dim 1 to 256", str(n))
      for n in (0, 257)),
    *(({"v": zeros(BATCH, SEQLEN_K, HEADS_KV, n)}, ValueError, "v: expected head_dim 1 to 256", str(n)) for n in (0, 257)),
    ({"q": torch.tensor(1.0), "mask": da.prefix_lm(3)}, ValueError, "q: expected (batch, seqlen, heads, head_dim)", "()"),
    *(({name: wrong}, TypeError, f"{name}: expected Optional[Tensor]", type(wrong).__name__)
      for name in ("seqlens_q", "seqlens_k", "starts_q", "starts_k") for wrong in (3, [1, 2])),
    *(({f"{name}_{side}": x, f"seqlens_{side}": x if name == "seqlens" else int32(1, 1)}, kind, f"{name}_{side}: expected {expected}", got)
      for name in ("seqlens", "starts") for side in ("q", "k") for x, kind, expected, got in (
          (torch.tensor([1, 2]), TypeError, "int32", "torch.int64"),
          (zeros(2), TypeError, "int32", "torch.float32"),
          (int32(1), ValueError, "shape (batch,) = (2,)", "(1,)"),
          (int32(1, 2)[:, None], ValueError, "shape (batch,) = (2,)", "(2, 1)"),
          (meta(2, dtype=torch.int32), ValueError, "q's device cpu", "meta"))),
    ({"starts_q": int32(0, 0)}, ValueError, "seqlens_q: expected lengths with starts_q", "None"),
    ({"starts_k": int32(0, 0)}, ValueError, "seqlens_k: expected lengths with starts_k", "None"),
    ({"seqlens_q": int32(5, 6)}, ValueError, "seqlens_q: expected lengths up to q's seqlen (5)", "6"),
    ({"seqlens_k": int32(2**31 - 1, 7)}, ValueError, "seqlens_k: expected lengths up to k's seqlen (7)", str(2**31 - 1)),
    ({"seqlens_q": int32(-1, 5)}, ValueError, "seqlens_q: expected lengths of at least 0", "-1"),
    ({"seqlens_k": int32(7, -(2**31))}, ValueError, "seqlens_k: expected lengths of at least 0", str(-(2**31))),
    ({"seqlens_q": int32(3, 3), "starts_q": int32(-1, 0)}, ValueError, "starts_q: expected at least 0", "-1"),
    ({"seqlens_q": int32(3, 3), "starts_q": int32(0, 3)}, ValueError, "starts_q: expected start + seqlen up to q's seqlen (5)", "6"),
    ({"seqlens_k": int32(1, 7), "starts_k": int32(2**31 - 1, 0)}, ValueError, "starts_k: expected start + seqlen up to k's seqlen (7)", str(2**31)),
    ({"bias": zeros(SEQLEN_Q, SEQLEN_K + 1)}, ValueError, "bias: expected a shape that broadcasts to (2, 4, 5, 7)", "(1, 1, 5, 8)"),
    ({"bias": zeros(HEADS_KV, SEQLEN_Q, SEQLEN_K)}, ValueError, "bias: expected a shape that broadcasts to (2, 4, 5, 7)", "(1, 2, 5, 7)"),
    ({"bias": zeros(3, 1, 1, 1, dtype=torch.bool)}, ValueError, "bias: expected a shape that broadcasts to (2, 4, 5, 7)", "(3, 1, 1, 1)"),
    ({"row_distance_bias": zeros(BATCH, HEADS, SEQLEN_K, 3)}, ValueError, "row_distance_bias: expected shape (2, 4, 5, 2R + 1)", "(2, 4, 7, 3)"),
    ({"col_distance_bias": zeros(BATCH, HEADS, SEQLEN_K, 2)}, ValueError, "col_distance_bias: expected shape (2, 4, 7, 2R + 1)", "(2, 4, 7, 2)"),
    *(({"backend": name} | {n: x.detach().double() for n, x in DENSE.items()}, ValueError, "backend: expected one that can run this call", name)
      for name in ("cpu", "triton")),
]  # fmt: skip

BAD_PACKED: list[Bad] = [
    *(({name: zeros(1, 8, HEADS, DIM)}, ValueError, f"{name}: expected (total, heads, head_dim)", "(1, 8, 4, 8)")
      for name in ("q", "k", "v")),
    ({"k": zeros(TOTAL_K, 3, DIM)}, ValueError, "k: expected heads_q (4) to be a multiple of heads_kv", "3"),
    ({"v": zeros(TOTAL_K, HEADS, DIM)}, ValueError, "v: expected k's heads (2)", "4"),
    ({"v": zeros(TOTAL_K - 1, HEADS_KV, DIM)}, ValueError, "v: expected k's rows (8)", "7"),
    ({"q": zeros(TOTAL_Q, HEADS, 257), "k": zeros(TOTAL_K, HEADS_KV, 257)}, ValueError, "q: expected head_dim 1 to 256", "257"),
    *(({name: wrong}, TypeError, f"{name}: expected ", type(wrong).__name__)
      for name in ("cu_seqlens_q", "cu_seqlens_k") for wrong in ([0, 3, 3, 5], 5)),
    ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: expected a tensor", "NoneType"),
    ({"cu_seqlens_q": None, "cu_seqlens_k": None}, TypeError, "cu_seqlens_q: expected a tensor", "NoneType"),
    ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_k: expected a tensor as cu_seqlens_q is", "None"),
    *(({f"cu_seqlens_{side}": x, "mask": da.prefix_lm(1)}, kind, f"cu_seqlens_{side}: expected ", got)
      for side in ("q", "k") for x, kind, got in (
          (torch.tensor([0, 3, 3, 5]), TypeError, "torch.int64"),
          (zeros(4), TypeError, "torch.float32"),
          (meta(4, dtype=torch.int32), ValueError, "meta"),
          (torch.tensor(0, dtype=torch.int32), ValueError, "()"),
          (int32(0, 1, 1, 1)[None], ValueError, "(1, 4)"),
          (int32(), ValueError, "(0,)"))),
    ({"cu_seqlens_k": int32(0, 8)}, ValueError, "cu_seqlens_k: expected the shape of cu_seqlens_q (4,)", "(2,)"),
    ({"cu_seqlens_q": int32(1, 3, 3, 5)}, ValueError, "cu_seqlens_q: expected 0 first", "1"),
    ({"cu_seqlens_k": int32(-1, 2, 5, 8)}, ValueError, "cu_seqlens_k: expected 0 first", "-1"),
    ({"cu_seqlens_q": int32(0, 3, 2, 5)}, ValueError, "cu_seqlens_q: expected entries that never decrease", "3 then 2 at 2"),
    ({"cu_seqlens_k": int32(0, 2, -(2**31), 8)}, ValueError, "cu_seqlens_k: expected entries that never decrease", "2 then -2147483648 at 2"),
    ({"cu_seqlens_q": int32(0, 3, 3, 7)}, ValueError, "cu_seqlens_q: expected a last entry up to q's rows (6)", "7"),
    ({"cu_seqlens_k": int32(0, 2, 5, 9)}, ValueError, "cu_seqlens_k: expected a last entry up to k's rows (8)", "9"),
    *(({f"max_seqlen_{side}": 2}, ValueError, f"max_seqlen_{side}: expected at least the longest sequence (3)", "2") for side in "qk"),
    *(({f"max_seqlen_{side}": -1}, ValueError, f"max_seqlen_{side}: expected at least 0", "-1") for side in "qk"),
    *(({f"max_seqlen_{side}": x}, TypeError, f"max_seqlen_{side}: expected int", type(x).__name__)
      for side in "qk" for x in (None, 4.0, "4")),
    ({"bias": zeros(TOTAL_Q, TOTAL_K)}, ValueError, "bias: expected a shape that broadcasts to (3, 4, 4, 3)", "(1, 1, 6, 8)"),
    ({"row_distance_bias": zeros(3, HEADS, 3, 5)}, ValueError, "row_distance_bias: expected shape (3, 4, 4, 2R + 1)", "(3, 4, 3, 5)"),
    ({"col_distance_bias": zeros(3, HEADS, 4, 5)}, ValueError, "col_distance_bias: expected shape (3, 4, 3, 2R + 1)", "(3, 4, 4, 5)"),
]  # fmt: skip

BAD_MERGE: list[Bad] = [
    *(({name: wrong}, TypeError, f"{name}: expected List[Tensor]", type(wrong).__name__)
      for name in ("outs", "lses") for wrong in (None, 1, [1, 2], OUTS[0])),
    ({"outs": [], "lses": []}, ValueError, "outs: expected at least one part", "none"),
    ({"lses": LSES[:1]}, ValueError, "lses: expected as many as outs (2)", "1"),
    ({"outs": [x[0, 0] for x in OUTS]}, ValueError, "outs[0]: expected (batch, seqlen, heads, head_dim) or", "(4, 8)"),
    ({"outs": [x.detach().int() for x in OUTS]}, TypeError, "outs[0]: expected float32", "torch.int32"),
    ({"outs": [OUTS[0], OUTS[1].half()]}, TypeError, "outs[1]: expected the dtype of outs[0]", "torch.float16"),
    ({"outs": [OUTS[0], OUTS[1][:, :4]]}, ValueError, "outs[1]: expected the shape of outs[0]", "(2, 4, 4, 8)"),
    ({"outs": [OUTS[0], meta(*OUTS[1].shape)]}, ValueError, "outs[1]: expected outs[0]'s device cpu", "meta"),
    ({"lses": [LSES[0], LSES[1].half()]}, TypeError, "lses[1]: expected torch.float32", "torch.float16"),
    ({"lses": [LSES[0].mT, LSES[1]]}, ValueError, "lses[0]: expected shape (2, 4, 5)", "(2, 5, 4)"),
    ({"lses": [LSES[0], meta(*LSES[1].shape)]}, ValueError, "lses[1]: expected outs[0]'s device cpu", "meta"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of cpu, triton, cuda, reference", "gpu"),
    ({"backend": 1}, TypeError, "backend: expected str", "int"),
    ({"outs": [x.double() for x in OUTS], "lses": [x.double() for x in LSES], "backend": "cpu"}, ValueError, "backend: expected one that can", "cpu: float64"),
]  # fmt: skip

CALLS = (
    (da.attention, DENSE, BAD_IN_BOTH + BAD_DENSE),
    (da.varlen_attention, PACKED, BAD_IN_BOTH + BAD_PACKED),
    (da.merge_attention, MERGE, BAD_MERGE),
)


def written(x: Any) -> str:
    if isinstance(x, Tensor) and x.is_nested:
        return f"nested.{x.layout}".replace("torch.", "")
    if isinstance(x, Tensor):
        return f"{x.device if not x.is_cpu else ''}{x.dtype}{list(x.shape)}".removeprefix("torch.").replace(" ", "")
    if isinstance(x, list | da.Mask):
        return f"[{','.join(map(written, x))}]"
    return str(x)


EVERY = [
    pytest.param(call, good, bad, id=f"{call.__name__}-" + ",".join(f"{name}={written(x)}" for name, x in bad[0].items()))
    for call, good, all_bad in CALLS
    for bad in all_bad
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def must_not_run(*_: Any) -> None:
        raise AssertionError("a kernel ran")

    for backend in BACKENDS.values():
        backend.missing()  # the CPU's backend finds its functions here
        for function in ("attention_forward", "attention_backward", "merge_attention"):
            monkeypatch.setattr(backend, function, must_not_run, raising=False)
    yield


def assert_says(error: BaseException, bad: Bad) -> None:
    _, kind, begins, got = bad
    assert type(error) is kind
    message = str(error)
    assert message.startswith(begins) and ", got " in message, message
    assert got in message.rpartition(", got ")[2], message


@pytest.mark.parametrize(("call", "good", "bad"), EVERY)
def test_a_wrong_argument_is_named(call: Any, good: dict[str, Any], bad: Bad) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call(**good | bad[0])
    assert_says(error.value, bad)


AT_THE_ENDS = [
    {},
    *({"mask": da.prefix_lm(x)} for x in (-(2**40), 2**40)),
    *({"mask": da.sliding_window(x, x)} for x in (0, 2**30)),
    *({"dropout_p": p, "seed": x} for p in (0.0, 0.999) for x in (-(2**63), 2**63 - 1, torch.tensor([0]))),
    *({"mask": mask(np.int64(3)), "dropout_p": 0.5, "seed": np.int64(3)} for mask in (da.prefix_lm, da.sliding_window)),
    *({"scale": x, "softcap": abs(x)} for x in (0.0, -1.0, torch.finfo(torch.float32).max)),
    {"bias": torch.tensor(True), "distance_bias": zeros(HEADS, 1)},
    {"backend": ""},
]


@pytest.mark.parametrize("change", AT_THE_ENDS, ids=str)
@pytest.mark.parametrize(("call", "good", "_"), CALLS[:2])
def test_values_at_the_ends_of_what_is_right_reach_a_kernel(call: Any, good: Any, _: Any, change: Any) -> None:
    with pytest.raises(AssertionError, match="a kernel ran"):
        call(**good | change)


def test_the_merge_that_is_made_wrong_is_right() -> None:
    with pytest.raises(AssertionError, match="a kernel ran"):
        da.merge_attention(**MERGE)


@pytest.mark.parametrize(("call", "good", "bad"), [case for case in EVERY if case.values[0] is not da.merge_attention])
def test_explain_raises_what_the_call_raises(call: Any, good: dict[str, Any], bad: Bad) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        da.explain(**good | bad[0])
    assert_says(error.value, bad)


def test_every_argument_is_made_wrong_somewhere() -> None:
    for call, _, all_bad in CALLS:
        assert set(inspect.signature(call).parameters) - {"return_lse"} <= {name for bad in all_bad for name in bad[0]}


# Under fullgraph=True shapes are looked at while tracing, where torch may wrap the error, and contents when the code runs.
SEEN_WHILE_TRACING = [
    (da.attention, DENSE, ({"k": zeros(BATCH, SEQLEN_K, 3, DIM)}, ValueError, "k: expected heads_q (4) to be a multiple", "3")),
    (da.attention, DENSE, ({"bias": zeros(SEQLEN_Q, 8)}, ValueError, "bias: expected a shape that broadcasts", "(1, 1, 5, 8)")),
    (da.attention, DENSE, ({"v": DENSE["v"].detach().half()}, TypeError, "v: expected q's dtype", "torch.float16")),
    (da.attention, DENSE, ({"softcap": -1.0}, ValueError, "softcap: expected 0 for none", "-1.0")),
    (da.attention, DENSE, ({"backend": "gpu"}, ValueError, "backend: expected one of cpu, triton, cuda, reference", "gpu")),
    (da.attention, DENSE, ({"mask": "causal"}, TypeError, "mask: expected a Mask", "str")),
    (da.varlen_attention, PACKED, ({"cu_seqlens_k": int32(0, 8)}, ValueError, "cu_seqlens_k: expected the shape of", "(2,)")),
    (da.varlen_attention, PACKED, ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: expected a tensor", "NoneType")),
    (da.merge_attention, MERGE, ({"lses": [LSES[0].mT, LSES[1]]}, ValueError, "lses[0]: expected shape (2, 4, 5)", "(2, 5, 4)")),
]  # fmt: skip
SEEN_WHEN_RUN = [
    (da.attention, DENSE, ({"seqlens_q": int32(5, 6)}, ValueError, "seqlens_q: expected lengths up to q's seqlen (5)", "6")),
    (da.attention, {n: x.double() for n, x in DENSE.items()}, ({"backend": "cpu"}, ValueError, "backend: expected one that can run", "cpu")),
    (da.varlen_attention, PACKED, ({"cu_seqlens_q": int32(0, 3, 2, 5)}, ValueError, "cu_seqlens_q: expected entries that never decrease", "3 then 2 at 2")),
    (da.varlen_attention, PACKED, ({"cu_seqlens_k": int32(0, 2, 5, 9)}, ValueError, "cu_seqlens_k: expected a last entry up to k's rows (8)", "9")),
    (da.varlen_attention, PACKED, ({"max_seqlen_k": 2}, ValueError, "max_seqlen_k: expected at least the longest sequence (3)", "2")),
]  # fmt: skip


def must_not_compile(*_: Any) -> None:
    raise AssertionError("traced to the end")


def compiled(call: Any, names: list[str], backend: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(lambda *values: call(**dict(zip(names, values, strict=True))), fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("call", "good", "bad"), SEEN_WHILE_TRACING, ids=lambda x: x[2] if isinstance(x, tuple) else None
)
def test_a_wrong_shape_is_named_while_tracing(call: Any, good: dict[str, Any], bad: Bad) -> None:
    arguments = good | bad[0]
    with pytest.raises(Exception) as raised:
        compiled(call, list(arguments), must_not_compile)(*arguments.values())
    chain: list[str] = []
    error: BaseException | None = raised.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    assert any(bad[2] in message for message in chain), chain
    assert not any("traced to the end" in message for message in chain)


@pytest.mark.parametrize(("call", "good", "bad"), SEEN_WHEN_RUN, ids=lambda x: x[2] if isinstance(x, tuple) else None)
def test_wrong_contents_are_named_when_compiled_code_runs(call: Any, good: dict[str, Any], bad: Bad) -> None:
    arguments = good | bad[0]
    function = compiled(call, list(arguments), "aot_eager")
    for _ in range(2):  # the second time nothing is traced
        with pytest.raises(ValueError) as error:
            function(*arguments.values())
        assert_says(error.value, bad)
