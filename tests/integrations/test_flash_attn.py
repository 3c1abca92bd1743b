"""flash-attn's functions on these kernels, against the float64 oracle."""

import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from duplex_attn.integrations import flash_attn
from duplex_attn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    pad_input,
    unpad_input,
)
from torch import Tensor

from ..oracle import Answer, Call, answer, assert_accurate, floors, plain_answer
from ..paged.pool import rotated

MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as flash-attn and as the oracle say it
    "full": ({}, {}),
    "causal": ({"causal": True}, {"right": 0}),
    "window": ({"window_size": (4, 2)}, {"left": 4, "right": 2}),
    "itself alone": ({"window_size": (0, 0)}, {"left": 0, "right": 0}),
    "causal window": ({"causal": True, "window_size": (3, -1)}, {"left": 3, "right": 0}),
    "causal over a window ahead": ({"causal": True, "window_size": (3, 5)}, {"left": 3, "right": 0}),
}
TERMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.9])},) * 2,
}


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(found: Any, call: Call, leaves: list[Tensor] | None = None) -> None:
    """found: out and lse. leaves: q, k and v with what is to be their gradient."""
    out, lse = found
    dout = made(*out.shape, seed=9, dtype=out.dtype) if leaves else None
    exact = answer(call, torch.float64, dout)
    got: Answer = {"out": out, "lse": lse}
    if leaves:
        out.backward(dout)
        got |= {f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True)}  # type: ignore[misc]
    assert_accurate(got, exact, plain_answer(call, exact, dout), floors(call, exact, dout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mask", MASKS)
def test_dense(mask: str, terms: str, dtype: torch.dtype) -> None:
    q, k, v = (
        made(2, 7, 4, 8, dtype=dtype),
        made(2, 11, 2, 8, seed=1, dtype=dtype),
        made(2, 11, 2, 8, seed=2, dtype=dtype),
    )
    call = Call(q, k, v, **MASKS[mask][1], **TERMS[terms][1])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, none = flash_attn_func(*leaves, return_attn_probs=True, **MASKS[mask][0], **TERMS[terms][0])
    assert none is None
    check((out, lse), call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mask", MASKS)
def test_varlen(mask: str, terms: str, dtype: torch.dtype) -> None:
    cu_q, cu_k = int32(0, 5, 6, 13), int32(0, 5, 13, 15)
    q, k, v = (made(n, h, 8, seed=h + n, dtype=dtype) for n, h in ((13, 4), (15, 2), (15, 2)))
    call = Call(q, k, v, cu_q, cu_k, **MASKS[mask][1], **TERMS[terms][1])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn_varlen_func(
        *leaves, cu_q, cu_k, 7, 8, return_attn_probs=True, **MASKS[mask][0], **TERMS[terms][0]
    )
    check((out, lse), call, leaves)


def test_packed_in_one_tensor() -> None:
    qkv = made(2, 9, 3, 4, 8).requires_grad_()
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    expected = flash_attn_func(*qkv.unbind(2), 0.0, 0.4, True, (3, 0))
    for found in (
        flash_attn_qkvpacked_func(qkv, 0.0, 0.4, True, (3, 0)),
        flash_attn_kvpacked_func(q, kv, 0.0, 0.4, True, (3, 0)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (whole,) = torch.autograd.grad(expected.square().sum(), qkv)
    (found,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv, 0.0, 0.4, True, (3, 0)).square().sum(), qkv)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)

    qkv, cu = qkv.detach().flatten(0, 1), int32(0, 4, 18)
    expected = flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 14, 14, 0.0, 0.4, True)
    found = flash_attn_varlen_qkvpacked_func(qkv, cu, 14, 0.0, 0.4, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, 14, 14, 0.0, 0.4, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dropout_and_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    q = made(2, 64, 4, 8)
    out = flash_attn_func(q, q, torch.ones_like(q), dropout_p=0.5)
    assert abs(float(out.mean()) - 1) < 0.1 < float(out.std())
    with pytest.raises(ValueError, match="return_attn_probs: expected False under dropout"):
        flash_attn_func(q, q, q, dropout_p=0.5, return_attn_probs=True)
    seen = []
    attention = flash_attn.functional.attention
    monkeypatch.setattr(
        flash_attn.functional, "attention", lambda *a, **o: seen.append(o["deterministic"]) or attention(*a, **o)
    )
    flash_attn_func(q, q, q, deterministic=True)
    flash_attn_func(q, q, q)
    assert seen == [True, None]  # None: as torch.use_deterministic_algorithms says


# Over a cache. Every slot that is not to be read holds NaN.

ROPE = made(40, 3, seed=5).cos(), made(40, 3, seed=5).sin()


def cached(
    kind: str, lengths: list[int], capacity: int, new: int
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """k_cache, v_cache and what says where sequences lie; and views of each sequence's slots."""
    caches, heads, head_dim = len(lengths) + 2, 2, 8
    shape = (caches, capacity, heads, head_dim)
    if kind == "both in one":
        k_cache, v_cache = torch.full((caches, capacity, 2, heads, head_dim), torch.nan).unbind(2)
    elif kind == "a part of longer ones":
        k_cache, v_cache = torch.full((2, caches, 2 * capacity, heads, head_dim), torch.nan)[:, :, :capacity].unbind(0)
    else:
        k_cache, v_cache = torch.full((2, *shape), torch.nan).unbind(0)
    given: dict[str, Any] = {"k_cache": k_cache, "v_cache": v_cache}
    places = list(range(len(lengths)))
    if kind == "by number":
        places = [3, 0, 2][: len(lengths)]
        given["cache_batch_idx"] = int32(*places)
    if kind == "pages":  # each sequence has two, anywhere
        places = [3, 0, 2, 4, 1, 5, 6, 7][: 2 * len(lengths)]
        k_cache, v_cache = torch.full((2, 8, capacity // 2, heads, head_dim), torch.nan).unbind(0)
        given = {"k_cache": k_cache, "v_cache": v_cache, "block_table": int32(*places).view(-1, 2)}
    rows = []
    for b, held in enumerate(lengths):
        for x, seed in ((k_cache, b), (v_cache, b + 50)):
            values = made(held, heads, head_dim, seed=seed)
            if kind == "pages":
                half = capacity // 2
                x[places[2 * b]][: min(held, half)] = values[:half]
                x[places[2 * b + 1]][: max(held - half, 0)] = values[half:]
            else:
                x[places[b]][:held] = values
        rows.append((made(held, heads, head_dim, seed=b), made(held, heads, head_dim, seed=b + 50)))
    return given, rows


@pytest.mark.parametrize("kind", ["in order", "by number", "pages", "both in one", "a part of longer ones"])
@pytest.mark.parametrize("capacity", [32, 640, 514])
@pytest.mark.parametrize(
    "queries, new, rope", [(1, 0, None), (1, 1, True), (3, 3, False), (3, 0, None), (2, 4, None), (3, 3, None)]
)
@pytest.mark.parametrize("mask", ["causal", "causal window"])
def test_cache(kind: str, capacity: int, queries: int, new: int, rope: bool | None, mask: str) -> None:
    lengths = [13, 1, 27]
    given, rows = cached(kind, lengths, capacity, new)
    q = made(3, queries, 4, 8, seed=3)
    added = [made(3, new, 2, 8, seed=seed) for seed in (11, 12)] if new else None
    if added:
        given |= {"k": added[0], "v": added[1]}
    if rope is not None:
        given |= {"rotary_cos": ROPE[0], "rotary_sin": ROPE[1], "rotary_interleaved": rope}
    found = flash_attn_with_kvcache(
        q, given.pop("k_cache"), given.pop("v_cache"), cache_seqlens=int32(*lengths), return_softmax_lse=True,
        softmax_scale=0.4, **MASKS[mask][0], **given,
    )  # fmt: skip

    turned, keys, values = [], [], []
    for b, (k, v) in enumerate(rows):
        fresh_k, fresh_v = (x[b] for x in added) if added else (k[:0], v[:0])
        mine = q[b]
        if rope is not None:
            places = lengths[b] + torch.arange(new)
            mine, fresh_k = (rotated(x, places, *ROPE, rope).float() for x in (mine, fresh_k))
        turned.append(mine)
        keys.append(torch.cat([k, fresh_k]))
        values.append(torch.cat([v, fresh_v]))
    cu_q, cu_k = (
        torch.nn.functional.pad(int32(*(len(x) for x in part)).cumsum(0), (1, 0)).int() for part in (turned, keys)
    )
    call = Call(*map(torch.cat, (turned, keys, values)), cu_q, cu_k, scale=0.4, **MASKS[mask][1])
    out, lse = found
    check((out.flatten(0, 1), lse.transpose(0, 1).flatten(1)), call)


def test_what_is_written_into_a_cache() -> None:
    k_cache, v_cache = torch.zeros(2, 3, 512, 2, 8)
    k, v = made(2, 2, 2, 8, seed=1), made(2, 2, 2, 8, seed=2)
    flash_attn_with_kvcache(made(2, 2, 4, 8), k_cache, v_cache, k, v, cache_seqlens=300, cache_batch_idx=int32(2, 0))
    for cache, new in ((k_cache, k), (v_cache, v)):
        expected = torch.zeros(3, 512, 2, 8)
        expected[2, 300:302], expected[0, 300:302] = new[0], new[1]
        torch.testing.assert_close(cache, expected, rtol=0, atol=0)


def test_a_whole_cache_and_no_gradients() -> None:
    q, cache = made(2, 1, 4, 8).requires_grad_(), made(2, 300, 2, 8, seed=1)
    out = flash_attn_with_kvcache(q, cache, cache)
    assert not out.requires_grad
    torch.testing.assert_close(out, flash_attn_func(q, cache, cache).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("page_size", [16, 768])
def test_varlen_over_pages(page_size: int) -> None:
    lengths, cu_q = [13, 1, 20], int32(0, 5, 6, 13)
    pages = torch.full((2, 7, page_size, 2, 8), torch.nan)
    table = int32(5, 1, 0, 0, 3, 6).view(3, 2)
    parts = []
    for b, held in enumerate(lengths):
        both = made(2, held, 2, 8, seed=b)
        for j in range(held):
            pages[:, table[b, j // page_size], j % page_size] = both[:, j]
        parts.append(both)
    k, v = torch.cat(parts, 1)
    cu_k, q = int32(0, 13, 14, 34), made(13, 4, 8)
    out, lse, _ = flash_attn_varlen_func(
        q, *pages, cu_q, cu_k, 7, 20, causal=True, return_attn_probs=True, block_table=table
    )
    check((out, lse), Call(q, k, v, cu_q, cu_k, right=0))


def test_compiled_without_graph_breaks() -> None:
    torch._dynamo.reset()
    caches = [torch.zeros(2, 3, 512, 2, 8) for _ in range(2)]
    k, v, q = made(3, 1, 2, 8, seed=1), made(3, 1, 2, 8, seed=2), made(3, 1, 4, 8)
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    for step in range(3):
        outs = [
            function(
                q, *cache, k + step, v - step, cache_seqlens=torch.full((3,), step, dtype=torch.int32), causal=True
            )
            for function, cache in ((flash_attn_with_kvcache, caches[0]), (compiled, caches[1]))
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert torch.equal(*caches) and caches[0][:, :, :3].abs().min() > 0
    whole = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(q, k, v, causal=True), flash_attn_func(q, k, v, causal=True), rtol=0, atol=0)


Q, CACHE = made(2, 3, 4, 8), torch.zeros(2, 300, 2, 8)


@pytest.mark.parametrize(
    "function, given, options, message",
    [
        (flash_attn_func, (Q, Q, Q), {"alibi_slopes": torch.ones(2, 4)}, "alibi_slopes: expected .* got \\(2, 4\\)"),
        (flash_attn_with_kvcache, (Q, CACHE, CACHE), {"cache_leftpad": int32(0, 1)}, "cache_leftpad: expected None"),
        (flash_attn_with_kvcache, (Q, CACHE, CACHE, Q[:, :, :2]), {}, "k, v: expected both or neither"),
        (flash_attn_with_kvcache, (Q, CACHE, CACHE), {"rotary_sin": ROPE[1]}, "rotary_cos, rotary_sin: expected both"),
        (flash_attn_with_kvcache, (Q, CACHE, CACHE), {"rotary_cos": ROPE[0], "rotary_sin": ROPE[1]}, "rotary_cos: expected None"),
        (
            flash_attn_with_kvcache,
            (Q, CACHE, CACHE, CACHE[:, :3], CACHE[:, :3], *ROPE),
            {"cache_seqlens": 4},
            "rotary_cos: expected None where several queries",
        ),
        (
            flash_attn_with_kvcache,
            (Q, CACHE, CACHE, CACHE[:, :2], CACHE[:, :2], *ROPE),
            {"cache_seqlens": 4, "causal": True},
            "k: expected as many rows as q \\(3\\)",
        ),
        (flash_attn_with_kvcache, (Q, CACHE, CACHE, CACHE[:, :3], CACHE[:, :3]), {"cache_seqlens": 299}, "positions"),
        (flash_attn_with_kvcache, (Q, CACHE, torch.zeros(2, 600, 2, 8)[:, :300]), {}, "v_cache: expected 300 rows between"),
        (flash_attn_with_kvcache, (Q, *[torch.zeros(9605).as_strided((2, 300, 2, 8), (4805, 16, 8, 1))] * 2), {}, "k_cache: expected the rows"),
        (
            flash_attn_varlen_func,
            (Q[0], CACHE, CACHE, int32(0, 3), int32(0, 5), 3, 5),
            {"block_table": int32(0)[None], "dropout_p": 0.1},
            "dropout_p: expected 0 with a block_table",
        ),
    ],
)  # fmt: skip
def test_bad_input(function: Any, given: tuple, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*given, **options)


def test_padding() -> None:
    x = made(3, 5, 2).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [1] * 5])
    more = torch.tensor([[0] * 5, [0, 1, 0, 0, 0], [0] * 5])
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask, more)
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 4, 9], 5, [3, 0, 5])
    assert cu_seqlens.dtype == used.dtype == torch.int32 and indices.tolist() == [0, 1, 3, 6, 10, 11, 12, 13, 14]
    kept = (mask + more)[..., None].float()
    torch.testing.assert_close(pad_input(packed, indices, 3, 5), x * kept, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(pad_input(packed, indices.int(), 3, 5).square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach() * kept, rtol=0, atol=0)


# In the place of the package.


@pytest.fixture
def nothing_installed() -> Iterator[None]:
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "flash_attn"}
    yield
    flash_attn.unregister()
    sys.modules.update(kept)


def test_the_place_of_the_package(nothing_installed: None) -> None:
    flash_attn.register()
    flash_attn.register()
    package = importlib.import_module("flash_attn")
    for name in ("flash_attn", "flash_attn.flash_attn_interface"):
        assert importlib.import_module(name).flash_attn_varlen_func is flash_attn_varlen_func
    assert package.bert_padding.unpad_input is unpad_input and package.__version__.startswith("2.")
    assert importlib.util.find_spec("flash_attn") is package.__spec__
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.layers.rotary")
    flash_attn.unregister()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


def test_a_package_that_was_imported_already(nothing_installed: None) -> None:
    theirs = sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    try:
        with pytest.raises(RuntimeError, match="flash_attn: expected not to be imported yet"):
            flash_attn.register()
        flash_attn.unregister()
        assert sys.modules["flash_attn"] is theirs
    finally:
        del sys.modules["flash_attn"]


def test_the_flash_attention_of_transformers(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attn_implementation="flash_attention_2"` imports and calls is there: padded prompts, windows and a cache."""
    transformers = pytest.importorskip("transformers")
    utils = importlib.import_module("transformers.modeling_flash_attention_utils")
    flash_attn.register()
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    for name in [name for name in vars(utils) if name.startswith("_") and not name.startswith("__")]:
        monkeypatch.setattr(utils, name, getattr(utils, name))  # what it found is forgotten afterwards
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, sliding_window=5, pad_token_id=0, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval().bfloat16()
    ids = torch.randint(3, 97, (3, 12))
    kept = torch.arange(12) >= torch.tensor([[0], [5], [1]])
    given = {"input_ids": ids, "attention_mask": kept.long()}
    seen = []
    varlen = flash_attn.functional.varlen_attention
    monkeypatch.setattr(flash_attn.functional, "varlen_attention", lambda *a, **o: seen.append(a[7]) or varlen(*a, **o))
    expected = model(**given).logits
    model.config._attn_implementation = "flash_attention_2"
    found = model(**given).logits
    assert [(mask.left, mask.right) for mask in seen] == [(4, 0)] * 2
    torch.testing.assert_close(found[kept], expected[kept], rtol=0.05, atol=0.1)
    assert model.generate(**given, max_new_tokens=4, do_sample=False).shape == (3, 16)
