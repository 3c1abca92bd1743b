"""`F.scaled_dot_product_attention` on these kernels: torch's own in float64 is what they are compared with."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from duplex_attn.integrations import sdpa
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint


def in_torch(*args: Any, **options: Any) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(*args, **options)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that ran on the kernels of the package; torch's own is back after each test."""
    seen: list[str] = []

    def watch(name: str, function: Any) -> None:
        def spy(*args: Any, **options: Any) -> Tensor:
            seen.append(name)
            return function(*args, **options)

        monkeypatch.setattr(sdpa.functional, name, spy)

    watch("attention", sdpa.functional.attention)
    watch("varlen_attention", sdpa.functional.varlen_attention)
    yield seen
    sdpa.unregister()


@pytest.fixture
def registered() -> None:
    sdpa.register()


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Those of one shape alike in nothing."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(function: Any, given: list[Tensor], **options: Any) -> dict[str, Tensor]:
    """Out, and the gradients of everything that has one."""
    out = function(*given, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wanted = [x for x in (*given, options.get("attn_mask")) if x is not None and x.requires_grad]
    return dict(enumerate((out.detach(), *torch.autograd.grad((out * weights).sum(), wanted))))  # type: ignore[arg-type]


def assert_as_torch(given: list[Tensor], **options: Any) -> None:
    mask = options.get("attn_mask")
    exact = [x.detach().double().requires_grad_() for x in given]
    if isinstance(mask, Tensor) and mask.is_floating_point() and type(mask) is Tensor:
        exact_options = options | {"attn_mask": mask.detach().double().requires_grad_(mask.requires_grad)}
    else:
        exact_options = options
    expected = results(in_torch, exact, **exact_options)
    found = results(F.scaled_dot_product_attention, given, **options)
    tolerance = 1e-5 if given[0].dtype == torch.float32 else 3e-2
    for name, x in expected.items():
        assert found[name].shape == x.shape
        torch.testing.assert_close(found[name].double(), x, rtol=tolerance, atol=tolerance)


MASK = torch.randn(7, 9, generator=torch.Generator().manual_seed(2))
SHAPES = {
    "one head": ((7, 8), (9, 8), (9, 8)),
    "one head beside several": ((7, 8), (4, 9, 8), (4, 9, 8)),
    "heads alone": ((4, 7, 8), (4, 9, 8), (4, 9, 8)),
    "a batch": ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 5)),
    "one head of keys": ((2, 4, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "one head of keys, of values all": ((2, 4, 7, 8), (2, 1, 9, 8), (2, 4, 9, 8)),
    "one head of queries": ((2, 1, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "keys for all sequences": ((2, 4, 7, 8), (1, 4, 9, 8), (4, 9, 8)),
    "queries for all sequences": ((1, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8)),
    "two dimensions in front": ((3, 2, 4, 7, 8), (3, 2, 4, 9, 8), (3, 2, 4, 9, 8)),
    "two that broadcast": ((3, 1, 4, 7, 8), (1, 2, 4, 9, 8), (2, 4, 9, 8)),
    "one sequence of five dimensions": ((1, 1, 4, 7, 8), (1, 1, 4, 9, 8), (1, 1, 4, 9, 8)),
}
TERMS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.7},
    "of some pairs": {"attn_mask": MASK > -0.5},
    "biased": {"attn_mask": MASK.clone().requires_grad_()},
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_and_terms(shapes: str, terms: str, registered: None, calls: list[str]) -> None:
    assert_as_torch(tensors(*SHAPES[shapes]), **TERMS[terms])
    assert calls == ["attention"]


@pytest.mark.parametrize(
    "shapes", [((2, 6, 7, 8), (2, 2, 9, 8)), ((6, 7, 8), (3, 9, 8)), ((2, 3, 6, 7, 8), (2, 3, 2, 9, 8))]
)
@pytest.mark.parametrize("terms", TERMS)
def test_grouped_queries(shapes: tuple, terms: str, registered: None, calls: list[str]) -> None:
    assert_as_torch(tensors(shapes[0], shapes[1], shapes[1]), enable_gqa=True, **TERMS[terms])
    assert calls == ["attention"]


@pytest.mark.parametrize(
    "shape", [(4, 7, 9), (1, 7, 9), (2, 4, 7, 9), (2, 1, 1, 9), (1, 1, 7, 1), (1, 4, 1, 9), (1, 9)]
)
def test_masks_that_broadcast(shape: tuple[int, ...], registered: None, calls: list[str]) -> None:
    (mask,) = tensors(shape)
    assert_as_torch(tensors(*SHAPES["a batch"]), attn_mask=mask)
    assert calls == ["attention"]


@pytest.mark.parametrize("shape", [(3, 2, 4, 7, 9), (3, 1, 1, 7, 9), (1, 2, 4, 1, 9), (1, 1, 4, 7, 9), (2, 1, 7, 9)])
def test_masks_of_five_dimensions(shape: tuple[int, ...], registered: None, calls: list[str]) -> None:
    (mask,) = tensors(shape)
    assert_as_torch(tensors(*SHAPES["two dimensions in front"]), attn_mask=mask)
    assert calls == ["attention"]


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("queries, keys", [(7, 9), (9, 9), (9, 7)])
def test_causal_biases(bias: Any, queries: int, keys: int, registered: None, calls: list[str]) -> None:
    given = tensors((2, 4, queries, 8), (2, 4, keys, 8), (2, 4, keys, 8))
    dense = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if bias is causal_lower_right else 0)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = results(in_torch, exact, attn_mask=dense)
    found = results(F.scaled_dot_product_attention, given, attn_mask=bias(queries, keys))
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), x.nan_to_num(), rtol=1e-5, atol=1e-5)
    assert calls == ["attention"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, registered: None, calls: list[str]) -> None:
    given = tensors(*SHAPES["a batch"], dtype=dtype)
    assert_as_torch(given, attn_mask=MASK)
    assert F.scaled_dot_product_attention(*given).dtype == dtype and calls == ["attention"] * 2


def test_dropout(registered: None, calls: list[str]) -> None:
    q, k, _ = tensors((2, 4, 64, 8), (2, 4, 64, 8), (2, 4, 64, 8))
    out = F.scaled_dot_product_attention(q, k, torch.ones_like(k), dropout_p=0.5)
    assert abs(float(out.mean()) - 1) < 0.1 < float(out.std()) and calls == ["attention"]


def test_autocast(registered: None, calls: list[str]) -> None:
    q, k, v = tensors(*SHAPES["a batch"])
    with torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16 and calls == ["attention"]


def test_vmap(registered: None, calls: list[str]) -> None:
    q, k, v = tensors((3, 4, 7, 8), (3, 4, 9, 8), (3, 4, 9, 8))
    with torch.no_grad():
        out = torch.vmap(F.scaled_dot_product_attention)(q, k, v)
    torch.testing.assert_close(out, in_torch(q, k, v).detach(), rtol=1e-5, atol=1e-5)
    assert calls == ["attention"]


# What torch computes instead.


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "a wide head": ({"shapes": ((2, 4, 7, 257), (2, 4, 9, 257), (2, 4, 9, 8))}, "query: expected a head_dim of 1 to 256, got 257"),
    "wide values": ({"shapes": ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 300))}, "value: expected a head_dim of 1 to 256, got 300"),
    "float64": ({"dtype": torch.float64}, "query: expected float32, float16 or bfloat16, got torch.float64"),
    "dropout of all": ({"dropout_p": 1.0}, "dropout_p: expected [0, 1), got 1.0"),
    "a mask beside is_causal": (
        {"shapes": ((2, 4, 9, 8),) * 3, "attn_mask": MASK[:1], "is_causal": True},
        "attn_mask: expected None where is_causal",
    ),
    "scale on a device": ({"scale": torch.tensor(0.5)}, "scale: expected a float, got a tensor"),
    "heads of values": (
        {"shapes": ((2, 4, 7, 8), (2, 2, 9, 8), (2, 4, 9, 8)), "enable_gqa": True},
        "value: expected as many heads as key (2), got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_what_torch_computes(why: str, registered: None, calls: list[str]) -> None:
    options, message = LEFT[why]
    options = dict(options)
    given = tensors(*options.pop("shapes", SHAPES["a batch"]), dtype=options.pop("dtype", torch.float32))
    with pytest.warns(UserWarning) as warned:
        found = F.scaled_dot_product_attention(*given, **options)
    assert [str(w.message) for w in warned] == [f"{message}; torch's own scaled_dot_product_attention computes it"]
    assert warned[0].filename == __file__
    torch.testing.assert_close(found, in_torch(*given, **options))
    assert calls == []


def test_a_tensor_of_another_library(registered: None, calls: list[str]) -> None:
    given = [TwoTensor(x.detach(), 2 * x.detach()) for x in tensors(*SHAPES["a batch"])]
    with pytest.warns(UserWarning, match="query: expected a plain tensor, got a TwoTensor"):
        out = F.scaled_dot_product_attention(*given)
    assert isinstance(out, TwoTensor) and calls == []


def test_a_device_without_kernels(registered: None, calls: list[str]) -> None:
    given = [x.to("meta") for x in tensors(*SHAPES["a batch"])]
    with pytest.warns(UserWarning, match="meta: expected a device with kernels of this package"):
        assert F.scaled_dot_product_attention(*given).shape == (2, 4, 7, 5)
    assert calls == []


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_kernel_of_torch_that_was_asked_for(
    backend: SDPBackend, registered: None, calls: list[str], recwarn: Any
) -> None:
    given = tensors(*[(2, 4, 9, 8)] * 3)
    with sdpa_kernel(backend):
        found, expected = F.scaled_dot_product_attention(*given), in_torch(*given)
    assert torch.equal(found, expected) and calls == [] and not recwarn


def test_any_kernel_of_torch_but_cudnn_s_is_no_choice(registered: None, calls: list[str]) -> None:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        F.scaled_dot_product_attention(*tensors(*SHAPES["a batch"]))
    assert calls == ["attention"]


@pytest.mark.parametrize(
    "shapes, options, error",
    [
        (((8,), (8,), (8,)), {}, "at least 2 dimensional"),
        (((2, 4, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)), {}, "broadcast"),
        (((2, 4, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)), {"enable_gqa": True}, "multiple of heads_kv, got 3"),
        (((2, 4, 7, 8), (2, 4, 9, 6), (2, 4, 9, 8)), {}, "k: expected"),
        (((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 8, 8)), {}, "v: expected"),
        (((2, 4, 7, 8),) * 3, {"attn_mask": torch.ones(7, 7, dtype=torch.int)}, "mask dtype to be bool or float"),
        (((2, 4, 7, 8),) * 3, {"attn_mask": torch.zeros(7, 6)}, "bias: expected a shape that broadcasts"),
        (((2, 4, 7, 8),) * 3, {"attn_mask": torch.zeros(3, 4, 7, 7)}, "bias: expected a shape that broadcasts"),
        (((2, 4, 7, 8),) * 3, {"attn_mask": causal_lower_right(7, 9)}, "must match"),
        (((2, 4, 7, 8),) * 3, {"attn_mask": causal_lower_right(7, 7), "is_causal": True}, "(?i)causal"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch's own")
def test_bad_input(shapes: tuple, options: dict[str, Any], error: str, registered: None) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=error):
        F.scaled_dot_product_attention(*tensors(*shapes), **options)


# Jagged tensors.


def jagged(lengths: list[int], heads: int = 4, head_dim: int = 8, seed: int = 0) -> Tensor:
    """(B, ragged, heads, head_dim)"""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, heads, head_dim, generator=generator) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def jagged_results(function: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[Tensor]:
    """Out and gradients, packed."""
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)
    weights = torch.randn(out.values().shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out.values() * weights).sum(), (q, k, v))
    return [x.values().detach() for x in (out, *grads)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    parts = zip(*(x.transpose(1, 2).unbind() for x in (q, k, v)), strict=True)
    out = [in_torch(*(x.transpose(0, 1) for x in part), **options).transpose(0, 1) for part in parts]
    return torch.nested.as_nested_tensor(out, layout=torch.jagged).transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_tensors(is_causal: bool, compiled: bool, registered: None, calls: list[str]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    torch._dynamo.reset()
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    for of_queries, of_keys in (([5, 1, 12], [5, 1, 12]), ([3, 17], [9, 4]), ([2, 2, 9, 1], [4, 1, 7, 30])):
        q, k = jagged(of_queries), jagged(of_keys, seed=1)
        values = torch.randn(k.values().shape, generator=torch.Generator().manual_seed(2))
        v = torch.nested.nested_tensor_from_jagged(values, k.offsets()).requires_grad_()  # of unknown longest
        found = jagged_results(function, q, k, v, is_causal=is_causal)
        expected = jagged_results(one_by_one, q, k, v, is_causal=is_causal)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert compiled or calls == ["varlen_attention"] * 3


@pytest.mark.parametrize("why", ["heads", "holes", "lengths", "mask", "mixed"])
def test_jagged_tensors_that_torch_takes(why: str, registered: None, calls: list[str]) -> None:
    q = k = v = jagged([3, 5]).transpose(1, 2)
    mask = None
    if why == "heads":
        q = jagged([3, 5], heads=8).transpose(1, 2)
    elif why == "holes":
        offsets, lengths = torch.tensor([0, 4, 9]), torch.tensor([3, 2])
        k = v = torch.nested.nested_tensor_from_jagged(torch.randn(9, 4, 8), offsets, lengths).transpose(1, 2)
    elif why == "lengths":
        v = jagged([5, 3]).transpose(1, 2)
    elif why == "mask":
        mask = torch.zeros(5, 5)
    else:
        q = torch.randn(2, 4, 3, 8)
    with pytest.warns(UserWarning, match=r"expected .*torch's own"), contextlib.suppress(Exception):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert calls == []


def test_jagged_tensors_that_torch_takes_are_told_of_once(registered: None) -> None:
    """Python shows a message again if it changed, and each tensor has a ragged size of its own name."""
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            F.scaled_dot_product_attention(*(jagged([3, 5]).transpose(1, 2) for _ in range(3)))
    assert (
        len({str(w.message) for w in warned if "torch's own" in str(w.message)}) == 1
    )  # torch tells of jagged tensors too


# In its place.


def test_the_place_of_torch_s_own() -> None:
    module = types.ModuleType("a_model")
    module.attend = F.scaled_dot_product_attention  # type: ignore[attr-defined]
    sys.modules["a_model"] = module
    try:
        sdpa.register()
        sdpa.register()  # again: nothing more
        here = [F.scaled_dot_product_attention, nn.functional.scaled_dot_product_attention, module.attend]
        assert here == [sdpa.scaled_dot_product_attention] * 3
        assert torch._C._nn.scaled_dot_product_attention is sdpa._torch_attention
        sdpa.unregister()
        assert [F.scaled_dot_product_attention, module.attend] == [torch._C._nn.scaled_dot_product_attention] * 2
    finally:
        del sys.modules["a_model"]


class ReadOnly(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


def test_modules_that_resist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that nothing may be set on, and a lazy one, which must not be loaded for this."""
    read_only = ReadOnly("read_only")
    vars(read_only)["attend"] = F.scaled_dot_product_attention
    (tmp_path / "lazy.py").write_text("raise ImportError")
    spec = importlib.util.spec_from_file_location("lazy", tmp_path / "lazy.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    loader.exec_module(lazy)
    for name, module in (("read_only", read_only), ("lazy", lazy)):
        monkeypatch.setitem(sys.modules, name, module)
    sdpa.register()
    assert read_only.attend is F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    sdpa.unregister()
    assert read_only.attend is F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (4, 8)).transpose(1, 2) for project in self.qkv)
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


def trained(function: Any, model: nn.Module, *given: Any, **options: Any) -> list[Tensor]:
    """Out and all gradients."""
    torch.manual_seed(0)
    model.zero_grad()
    out = function(*given, **options)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_transformers_of_torch(padded: bool, calls: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    src, tgt = torch.randn(3, 11, 32), torch.randn(3, 7, 32)
    hidden = torch.arange(11) >= torch.tensor([[11], [4], [8]]) if padded else None
    options = dict(
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
        tgt_is_causal=True,
        src_key_padding_mask=hidden,
        memory_key_padding_mask=hidden,
    )
    expected = trained(model, model, src, tgt, **options)
    assert calls == []
    sdpa.register()
    assert_equal(trained(model, model, src, tgt, **options), expected)
    assert calls == ["attention"] * 6


def test_checkpointing(registered: None, calls: list[str]) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 9, 32)
    expected = trained(block, block, x)
    found = trained(lambda y: checkpoint(block, y, use_reentrant=False), block, x)
    assert_equal(found, expected)
    assert calls == ["attention"] * 3


@pytest.mark.parametrize("is_causal", [False, True])
def test_compile_notices(is_causal: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    block, x = Block(), torch.randn(2, 9, 32)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    expected = trained(compiled, block, x, is_causal=is_causal)
    assert "duplex_attn" not in graphs.pop()
    sdpa.register()
    assert_equal(trained(compiled, block, x, is_causal=is_causal), expected)
    assert "duplex_attn" in graphs.pop() and not graphs
    sdpa.unregister()
    with torch.no_grad():
        compiled(x, is_causal=is_causal)
    assert not graphs or "duplex_attn" not in graphs.pop()


def test_export(registered: None) -> None:
    block, x = Block().eval(), torch.randn(2, 9, 32)
    program = torch.export.export(block, (x,))
    assert "duplex_attn.attention_forward" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.filterwarnings("ignore:.*torch's own", "ignore:.*deprecated", "ignore::torch.jit.TracerWarning")
def test_torch_jit_and_fx_record_torch_s_own(registered: None, calls: list[str]) -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    traced = torch.jit.trace(Attend(), tensors(*[(2, 4, 9, 8)] * 3), check_trace=False)
    given = tensors(*[(3, 4, 17, 8)] * 3)
    for function in (traced, torch.jit.script(Attend()), torch.fx.symbolic_trace(Attend())):
        torch.testing.assert_close(function(*given), in_torch(*given, is_causal=True))
    assert calls == []
