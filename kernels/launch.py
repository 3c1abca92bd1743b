"""A launch as plain data: printable, compiled ahead of time by the tests, run by calling it.

Triton looks at every argument of every launch to find the kernel that was compiled for such ones, which takes longer than all else that
happens on the host. So calls that differ in nothing but where their tensors lie share one search: what it found is kept together with
the arguments, as a function of the addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


NOT_TENSORS = {type(None), bool, int, float, str}
MANY = 4096  # calls that are kept: a process that has seen more shapes than this begins anew
_bound: dict[tuple[Any, ...], list[Callable[[list[int], list[Tensor]], Any]]] = {}
tuning.derived.append(_bound.clear)


def run(name: str, arguments: Iterable[Any], made: Iterable[Tensor], make: Callable[[], Iterable[Launch]]) -> None:
    """The launches of `make`, in order, on the current stream of the device.

    They follow from `name` and `arguments`; `made` are the other tensors in them, which follow from these too. Each tensor in them
    begins where one of all those does.
    """
    facts, tensors = _facts(name, arguments)
    tensors += made
    if tensors[0].is_cpu or TensorDescriptor is None:
        for launch in make():
            if launch.programs > 0:
                _first(launch)
        return
    device = tensors[0].get_device()
    facts.append(device)
    if device == torch.cuda.current_device():
        _run_bound(facts, tensors, make)
    else:
        with torch.cuda.device(device):
            _run_bound(facts, tensors, make)


def _facts(name: str, arguments: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """All that these are but the tensors' addresses, and the tensors."""
    facts: list[Any] = [name]
    tensors: list[Tensor] = []
    for x in arguments:
        if type(x) in NOT_TENSORS:
            facts.append(x)
        else:
            tensors.append(x)
            facts += x.shape, x.stride(), x.dtype
    return facts, tensors


def _run_bound(facts: list[Any], tensors: list[Tensor], make: Callable[[], Iterable[Launch]]) -> None:
    addresses = [x.data_ptr() for x in tensors]
    facts += [address & 15 for address in addresses]
    if len(set(addresses)) < len(addresses):  # which of them are one
        facts += map(addresses.index, addresses)
    call = tuple(facts)
    if (bound := _bound.get(call)) is not None:
        for again in bound:
            again(addresses, tensors)
        return
    found = [(launch, _first(launch)) for launch in make() if launch.programs > 0]
    if all(compiled is not None for _, compiled in found):  # not interpreted
        if len(_bound) >= MANY:
            _bound.clear()
        _bound[call] = [_bind(launch, compiled, addresses) for launch, compiled in found]


def _first(launch: Launch) -> Any:
    """By Triton's own search, whose compiled kernel it returns."""
    return launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants, **launch.options)


def _bind(launch: Launch, compiled: Any, addresses: list[int]) -> Callable[[list[int], list[Tensor]], Any]:
    """The same launch for other addresses, and for the tensors there."""
    descriptors: list[Any] = []

    def expression(x: Any) -> str:
        if isinstance(x, Tensor):
            return f"addresses[{addresses.index(x.data_ptr())}]"
        if isinstance(x, tuple):
            return f"({''.join(f'{expression(part)}, ' for part in x)})"
        if isinstance(x, TensorDescriptor):
            descriptors.append(_moved(x, None))
            return f"moved(descriptors[{len(descriptors) - 1}], tensors[{addresses.index(x.base.data_ptr())}])"
        return repr(x)

    names = launch.kernel.arg_names[len(launch.arguments) :]
    everything = (*launch.arguments, *(launch.constants[name] for name in names))
    written = "".join(f"{expression(x)}, " for x in everything)
    known = {"run": compiled[(launch.programs, 1, 1)], "descriptors": descriptors, "moved": _moved, "inf": math.inf}
    return eval(f"lambda addresses, tensors: run({written})", known)


def _moved(descriptor: Any, x: Tensor | None) -> Any:
    """The descriptor for another tensor that is like its own, and would stand all the tests of a new one."""
    other = object.__new__(TensorDescriptor)
    other.__dict__ = {**descriptor.__dict__, "base": x}
    return other


def options(tile: tuning.Config) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """(batch, head, row, dim) of x, packed without batch, for bulk copies of (rows, columns); beyond head_dim they bring 0.

    None where the strides or the address of x do not allow them.
    """
    if TensorDescriptor is None or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return None
    unit = 16 // x.element_size()
    order = [*range(x.dim() - 3), -2, -3]
    strides = [x.stride(n) if x.shape[n] > 1 else unit for n in order]
    if any(stride <= 0 or stride % unit for stride in strides):
        return None
    shape = [x.shape[n] for n in (*order, -1)]
    return TensorDescriptor(x, shape, [*strides, 1], [*[1] * (x.dim() - 2), rows, columns])
