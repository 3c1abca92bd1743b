"""A call that differs from an earlier one in nothing but addresses runs its kernels without Triton's search, with the very same
arguments. Kernels and card are played."""

from __future__ import annotations

import gc
import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.tools.tensor_descriptor")

import duplex_attn as da
from duplex_attn.kernels import attention, launch, paged_calls, tuning
from duplex_attn.kernels.launch import Launch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..cases import Case, make
from ..lanes import Lane, run


class PlayedTensor:
    """One on a card."""

    is_cpu = False

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.x, name)

    def get_device(self) -> int:
        return 0


class PlayedKernel:
    """Remembers the arguments of its launches: those that Triton looked at, and those of what it found."""

    def __init__(self, arg_names: list[str]) -> None:
        self.arg_names = arg_names
        self.searched: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*arguments: Any, num_warps: int, **constants: Any) -> PlayedCompiled:
            everything = (*arguments, *(constants[name] for name in self.arg_names[len(arguments) :]))
            self.searched.append((grid, *everything))
            return PlayedCompiled(self)

        return first


class PlayedCompiled:
    def __init__(self, kernel: PlayedKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.ran.append((grid[:1], *arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedKernel]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch._bound.clear()
    yield PlayedKernel(["x", "rest", "descriptor", "N", "BLOCK"])
    launch._bound.clear()


def call(kernel: PlayedKernel, *tensors: Tensor, n: int = 3, block: int = 16) -> None:
    x, *rest = tensors
    tile = (1, block)
    described = TensorDescriptor(x, list(x.shape), list(x.stride()), tile) if x.data_ptr() % 16 == 0 else None
    launched = Launch(kernel, n, (x, (tuple(rest), 0.5, None), described, n), {"BLOCK": block}, {"num_warps": 4})
    launch.run("played", (*map(PlayedTensor, tensors), n), (), lambda: [launched])


def plainly(x: Any) -> Any:
    """Tensors as their addresses, descriptors as their fields."""
    if isinstance(x, TensorDescriptor):
        return plainly((x.base, *x.shape, *x.strides, *x.block_shape))
    if isinstance(x, tuple):
        return tuple(map(plainly, x))
    return x.data_ptr() if isinstance(x, Tensor | PlayedTensor) else x


def aligned(*shape: int) -> Tensor:
    return torch.empty(*shape)


def test_a_call_seen_before_gets_the_arguments_that_a_first_one_would(kernel: PlayedKernel) -> None:
    for _ in range(3):
        call(kernel, *(aligned(8, 4) for _ in range(3)))
        last = [aligned(8, 4) for _ in range(3)]
        call(kernel, *last)
    assert len(kernel.searched) == 1 and len(kernel.ran) == 5
    again = kernel.ran[-1]
    launch._bound.clear()
    call(kernel, *last)
    assert plainly(kernel.searched[-1]) == plainly(again)


@pytest.mark.parametrize("other", ["shape", "stride", "dtype", "alignment", "number", "one for two"])
def test_whatever_triton_could_look_at_is_another_call(kernel: PlayedKernel, other: str) -> None:
    x, y = aligned(8, 4), aligned(8, 4)
    call(kernel, x, y)
    changed = {
        "shape": aligned(7, 4),
        "stride": aligned(8, 8)[:, :4],
        "dtype": torch.empty(8, 4, dtype=torch.int32),
        "alignment": torch.empty(40)[1:33].view(8, 4),
        "one for two": x,
    }
    call(kernel, x, changed.get(other, y), n=4 if other == "number" else 3)
    assert len(kernel.searched) == 2 and not kernel.ran


def test_tensors_that_are_one_are_told_from_two_that_are_alike(kernel: PlayedKernel) -> None:
    x, y, z = (aligned(8, 4) for _ in range(3))
    call(kernel, x, x, y)
    call(kernel, x, y, y)
    call(kernel, z, z, x)
    assert len(kernel.searched) == 2
    assert plainly(kernel.ran[0])[1:3] == (z.data_ptr(), ((z.data_ptr(), x.data_ptr()), 0.5, None))


def test_nothing_of_a_call_is_kept(kernel: PlayedKernel) -> None:
    x = aligned(8, 4)
    gone = weakref.ref(x)
    call(kernel, x, aligned(8, 4))
    kernel.searched.clear()
    del x
    gc.collect()
    assert gone() is None


def test_another_table_is_searched_for_anew(kernel: PlayedKernel) -> None:
    call(kernel, aligned(8, 4))
    tuning.adopt("sm_90", tuning.tables()["sm_90"])
    call(kernel, aligned(8, 4))
    assert len(kernel.searched) == 2


def test_calls_that_are_kept_have_a_bound(kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MANY", 3)
    for n in range(1, 9):
        call(kernel, aligned(8, 4), n=n)
        assert len(launch._bound) <= 3


def test_what_is_interpreted_is_not_kept(kernel: PlayedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlayedKernel, "__getitem__", lambda self, grid: lambda *arguments, **constants: None)
    call(kernel, aligned(8, 4))
    assert not launch._bound


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every launch is interpreted, and made again from nothing but the call's tensors for a kernel that compares. Names of those kernels."""
    found: set[str] = set()

    class Compared:
        def __init__(self, launched: Launch) -> None:
            self.launched = launched

        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            kernel, programs, arguments, constants, _ = self.launched
            names = list(inspect.signature(kernel.fn).parameters)[len(arguments) :]
            expected = (*arguments, *(constants[name] for name in names))

            def again(*given: Any) -> None:
                assert grid == (programs, 1, 1) and plainly(given) == plainly(expected), kernel
                found.add(kernel.__name__)

            return again

    def run_and_compare(
        name: str, arguments: Iterable[Any], made: Iterable[Tensor], make: Callable[[], Iterable[Launch]]
    ) -> None:
        _, tensors = launch._facts(name, arguments)
        tensors += made
        addresses = [x.data_ptr() for x in tensors]
        for launched in make():
            if launched.programs > 0:
                names = list(inspect.signature(launched.kernel.fn).parameters)
                monkeypatch.setattr(launched.kernel, "arg_names", names, raising=False)
                launch._bind(launched, Compared(launched), addresses)(addresses, tensors)
                launch._first(launched)

    monkeypatch.setattr(attention, "run", run_and_compare)
    monkeypatch.setattr(paged_calls, "run", run_and_compare)
    yield found


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a CUDA card is there")
KERNELS = {f"{name}_kernel" for name in ("forward", "delta", "dq", "dkdv", "dbias", "diagonals", "table")}
TERMS = {"distance_radius": 3, "alibi": True, "sink": "own", "dropout_p": 0.2, "softcap": 2.0}


@interpreted
@pytest.mark.parametrize("case", [
    Case("dense", ((5,), (9,)), (2, 1), (16, 16), torch.bfloat16, "prefix_each", bias="full", **TERMS),
    Case("padded_anywhere", ((5, 0), (9, 3)), (2, 1), (16, 8), torch.float16, bias="keys", **TERMS),
    Case("packed_heads_first", ((5, 3), (9, 2)), (2, 1), (16, 8), torch.bfloat16, bias="bool_keys", distance_radius=3),
], ids=str)  # fmt: skip
def test_every_launch_of_a_call(case: Case, compared: set[str]) -> None:
    made = make(case)
    run(made.call, Lane("triton"), made.dout, made.dlse)
    assert compared >= KERNELS - ({"dbias_kernel"} if case.bias == "bool_keys" else set())


@interpreted
def test_every_launch_where_tensors_are_one(compared: set[str]) -> None:
    x = torch.randn(1, 7, 2, 16, requires_grad=True)
    da.attention(x, x, x, da.causal(), backend="triton").backward(x.detach())
    one = x.detach()
    da.merge_attention([one, one], [torch.zeros(1, 2, 7)] * 2, backend="triton")
    assert compared == {"forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel", "merge_kernel"}


@interpreted
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_launch_over_pages(stored: torch.dtype, compared: set[str]) -> None:
    pages = torch.zeros(4, 16, 1, 16).to(stored)
    scales = None if stored == torch.bfloat16 else torch.ones(4, 16, 1)
    table, lengths = torch.arange(4, dtype=torch.int32)[None], torch.tensor([40], dtype=torch.int32)
    stored_as = {"k_scales": scales, "v_scales": scales, "backend": "triton"}
    q, new = torch.randn(1, 2, 16).bfloat16(), torch.randn(1, 1, 16).bfloat16()
    bias = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    for options in ({}, {"batch_invariant": True}, {"bias": bias}):
        da.paged_attention(q, pages, pages, table, lengths, **stored_as, **options)
    da.paged_append(new, new, pages, pages.clone(), table, lengths, **stored_as)
    da.copy_pages(pages, pages.clone(), torch.tensor([0]).int(), torch.tensor([2]).int(), backend="triton")
    assert compared >= {"paged_kernel", "append_kernel", "copy_kernel"}
