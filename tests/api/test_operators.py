"""Every operator with every optional argument: torch's checks of schema, fake and autograd; gradients by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duplex_attn as da
import pytest
import torch
from torch.library import opcheck

from .calls import BACKENDS, BACKWARD, EVERY_CALL, FORWARD, GRADIENTS, HEADS, MERGE, dense, int32, leaf, made, packed


@pytest.mark.parametrize(("name", "backend"), EVERY_CALL)
def test_forward_passes_opcheck(name: str, backend: str) -> None:
    opcheck(FORWARD, tuple((made(name) | {"backend": backend}).values()))


@pytest.mark.parametrize("lse_gradient", [True, False])
@pytest.mark.parametrize(("name", "backend"), EVERY_CALL)
def test_backward_passes_opcheck(name: str, backend: str, lse_gradient: bool) -> None:
    call = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in made(name).items()} | {
        "backend": backend
    }
    out, lse = FORWARD(*call.values())
    dlse = torch.randn_like(lse) if lse_gradient else None
    wanted = [call[key] is not None and call[key].is_floating_point() for key in GRADIENTS]
    *shared, last = call.values()
    arguments = (torch.randn_like(out), dlse, out, lse, *shared, wanted, last)
    opcheck(BACKWARD, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    for key, want, grad in zip(GRADIENTS, wanted, BACKWARD(*arguments), strict=True):
        assert (grad.shape, grad.dtype) == ((call[key].shape, call[key].dtype) if want else ((0,), torch.float32)), key


@pytest.mark.parametrize("name", ["full", "bias_broadcast", "sink", "packed"])
def test_triton_passes_opcheck(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("interpreted kernels are for machines without a card; -m gpu runs the compiled ones")
    opcheck(FORWARD, tuple((made(name) | {"backend": "triton"}).values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed_rows", [False, True])
def test_merge_passes_opcheck(backend: str, packed_rows: bool) -> None:
    rows, lse_rows = ((5,), (HEADS, 5)) if packed_rows else ((2, 5), (2, HEADS, 5))
    outs, lses = [leaf(*rows, HEADS, 6) for _ in range(3)], [leaf(*lse_rows) for _ in range(3)]
    opcheck(MERGE, (outs, lses, backend))


def test_unwanted_gradients_are_not_computed() -> None:
    call = dense(bias=leaf(2, HEADS, 5, 7), sink=leaf(HEADS), backend="reference")
    out, lse = FORWARD(*call.values())
    *shared, last = call.values()
    grads = BACKWARD(torch.ones_like(out), None, out, lse, *shared, [False] * 7 + [True], last)
    assert [grad.numel() for grad in grads] == [0] * 7 + [HEADS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [dense, packed], ids=["dense", "packed"])
def test_backward_takes_its_inputs_in_any_strides(make: Callable[..., dict[str, Any]], backend: str) -> None:
    """Among them an lse that repeats in memory, as vmap has it for a batch of one."""
    torch.manual_seed(0)
    call = make(right=0, sink=leaf(HEADS), backend=backend, deterministic=True)
    *shared, last = call.values()
    wanted = [call[name] is not None for name in GRADIENTS]
    out, lse = (x.detach() for x in FORWARD(*call.values()))
    given = [torch.randn_like(out), torch.randn_like(lse), out, lse]

    def backward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return BACKWARD(*tensors, *shared, wanted, last)

    def reversed_in_memory(x: torch.Tensor) -> torch.Tensor:
        return x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1])

    strided = backward(*map(reversed_in_memory, given))
    assert all(map(torch.equal, strided, backward(*given)))
    repeated = [x[:1].expand_as(x) for x in given]
    assert all(map(torch.equal, backward(*repeated), backward(*(x.contiguous() for x in repeated))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_takes_what_a_hook_restores_in_any_strides(backend: str) -> None:
    torch.manual_seed(0)
    tensors = {name: leaf(1, 5, HEADS, 8) for name in "qkv"}
    tensors |= {"distance_bias": leaf(HEADS, 5), "sink": leaf(HEADS)}
    others = {"alibi_slopes": torch.rand(HEADS), "deterministic": True, "backend": backend}

    def grads(unpack: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out = da.attention(**tensors, **others)
        return torch.autograd.grad(out.square().sum(), list(tensors.values()))

    got, want = grads(lambda x: torch.stack([x, x + 7], -1)[..., 0]), grads(lambda x: x)
    assert all(map(torch.equal, got, want))


EVERYTHING = {
    "distance_bias": lambda: leaf(HEADS, 5, dtype=torch.float64),
    "sink": lambda: leaf(HEADS, dtype=torch.float64),
    "alibi_slopes": lambda: torch.rand(HEADS, dtype=torch.float64),
}


@pytest.mark.parametrize("shown", ["out", "lse"])
@pytest.mark.parametrize("kind", ["dense", "starts", "packed"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_gradients_against_differences(kind: str, softcap: float, dropout_p: float, shown: str) -> None:
    torch.manual_seed(0)
    given = {name: make() for name, make in EVERYTHING.items()} | {
        "backend": "reference",
        "softcap": softcap,
        "right": 0,
    }
    given |= {"dropout_p": dropout_p, "seed": torch.tensor([9]) if dropout_p else None}
    if kind == "packed":
        given |= {"bias": leaf(3, 1, 4, 3, dtype=torch.float64), "prefix": int32(2, 0, 1)}
        given["row_distance_bias"] = leaf(3, HEADS, 4, 3, dtype=torch.float64)
        given["col_distance_bias"] = leaf(3, HEADS, 3, 1, dtype=torch.float64)
        call = packed(torch.float64, **given)
    else:
        given |= {"bias": leaf(1, HEADS, 5, 7, dtype=torch.float64), "prefix": int32(2, 0)}
        given["row_distance_bias"] = leaf(2, HEADS, 5, 3, dtype=torch.float64)
        given["col_distance_bias"] = leaf(2, HEADS, 7, 5, dtype=torch.float64)
        if kind == "starts":
            given |= {
                "seqlens_q": int32(3, 5),
                "seqlens_k": int32(4, 0),
                "starts_q": int32(2, 0),
                "starts_k": int32(3, 1),
            }
        call = dense(torch.float64, **given)

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = FORWARD(*(call | dict(zip(GRADIENTS, leaves, strict=True))).values())
        return out if shown == "out" else lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, tuple(call[name] for name in GRADIENTS), fast_mode=True)


def test_merge_gradients_against_differences() -> None:
    torch.manual_seed(0)
    outs = [leaf(2, 3, HEADS, 5, dtype=torch.float64) for _ in range(3)]
    lses = [leaf(2, HEADS, 3, dtype=torch.float64) for _ in range(3)]

    def merge(*parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return MERGE(parts[:3], parts[3:], "reference")

    assert torch.autograd.gradcheck(merge, (*outs, *lses))
