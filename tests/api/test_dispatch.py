"""Operators without the dispatcher: the same bits, and never where somebody asked to be told of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn import ops
from duplex_attn.paged import ops as paged_ops
from torch import Tensor
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .calls import int32

OPERATORS = {
    "forward": ops.forward_operator,
    "backward": ops.backward_operator,
    "attention": paged_ops.attention_operator,
    "append": paged_ops.append_operator,
    "copy": paged_ops.copy_operator,
}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators whose kernels were called without the dispatcher, as it happens."""
    taken: list[str] = []
    for name, operator in OPERATORS.items():

        def kernel(*arguments: Any, real: Callable[..., Any] = operator.kernel, name: str = name) -> Any:
            taken.append(name)
            return real(*arguments)

        monkeypatch.setattr(operator, "kernel", kernel)
    return taken


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6)


def paged_step() -> Tensor:
    """One token of one sequence, kept, copied to another page and attended to."""
    k_pages, v_pages = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)
    k, v, q = torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 8)
    da.paged_append(k, v, k_pages, v_pages, int32(0)[None], int32(0))
    da.copy_pages(k_pages, v_pages, int32(0), int32(1))
    return da.paged_attention(q, k_pages, v_pages, int32(1)[None], int32(1), da.causal())


def test_plain_calls_are_direct(ways: list[str], qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv)
    da.attention(q, k, v, da.causal()).sum().backward()
    assert ways == ["forward", "backward"]
    with torch.inference_mode():
        paged_step()
    with torch.no_grad():
        paged_step()
    assert ways == ["forward", "backward", "append", "copy", "attention"]


def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    def results() -> Iterator[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        sink = torch.nn.Parameter(torch.ones(4))
        out, lse = da.attention(*leaves, da.prefix_lm(2), sink=sink, return_lse=True)
        (out.sum() + lse.sum()).backward()
        yield from (out, lse, sink.grad, *(x.grad for x in leaves), paged_step())

    direct = list(results())
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "kernel", None)
        monkeypatch.setattr(operator, "is_direct", lambda arguments: False)
    for one, other in zip(direct, results(), strict=True):
        assert torch.equal(one, other)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.append(str(operator))
        return operator(*arguments, **(options or {}))


class Heard(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        self.names.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode", [Seen, Heard])
def test_modes_are_told(ways: list[str], qkv: tuple[Tensor, Tensor, Tensor], mode: type) -> None:
    with mode() as told:
        da.attention(*qkv)
    assert "duplex_attn.attention_forward.default" in told.names
    with mode() as told, torch.no_grad():
        paged_step()
    wanted = {f"duplex_attn.{name}.default" for name in ("paged_append", "copy_pages", "paged_attention")}
    assert wanted <= set(told.names)
    assert ways == []


def test_profilers_are_told(ways: list[str], qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        da.attention(*qkv)
    assert "duplex_attn::attention_forward" in {event.key for event in profile.key_averages()}
    assert ways == []


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: FlopCounterMode(display=False)]
)
def test_contexts_go_through_the_dispatcher(
    ways: list[str], qkv: tuple[Tensor, Tensor, Tensor], context: Callable[[], AbstractContextManager[Any]]
) -> None:
    with context():
        da.attention(*qkv)
    assert ways == []


class Wrapped(Tensor):
    """An ordinary subclass: its results are of its kind."""


TRANSFORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "vmap": lambda q, k, v: vmap(da.attention, (0, None, None))(q[None], k, v),
    "grad": lambda q, k, v: grad(lambda q: da.attention(q, k, v).sum())(q),
    "trace": lambda q, k, v: torch.jit.trace(da.attention, (q, k, v), check_trace=False),
    "negative view": lambda q, k, v: da.attention(torch._neg_view(q), k, v),
    "subclass": lambda q, k, v: da.attention(q.as_subclass(Wrapped), k, v),
    "meta": lambda q, k, v: da.attention(q.to("meta"), k.to("meta"), v.to("meta")),
    "whole softcap": lambda q, k, v: da.attention(q, k, v, softcap=30),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_not_ordinary_goes_through_the_dispatcher(
    ways: list[str], qkv: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    TRANSFORMS[name](*qkv)
    assert "forward" not in ways


def test_a_negative_view_is_read_as_what_it_means(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    assert torch.equal(da.attention(torch._neg_view(q), k, v), da.attention(-q, k, v))


def test_every_thread_is_asked_about_itself(ways: list[str], qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    with Seen():
        thread = Thread(target=da.attention, args=qkv)
        thread.start()
        thread.join()
        assert ways == ["forward"]
        da.attention(*qkv)
    assert ways == ["forward"]


@pytest.mark.parametrize(
    "given", [{"scale": "1"}, {"softcap": None}, {"batch_invariant": torch.ones(2)}, {"seqlens_q": [1, 2]}]
)
@pytest.mark.parametrize("before", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_wrong_kinds_are_refused_each_time(
    qkv: tuple[Tensor, Tensor, Tensor], given: dict[str, Any], before: Callable[[], AbstractContextManager[Any]]
) -> None:
    for _ in range(2):
        with before(), pytest.raises(TypeError, match=f"^{next(iter(given))}: expected"):
            da.attention(*qkv, **given)
