"""Who can run a call, who does, and why not the others.

A backend may be missing from a machine or refuse a call, each with a reason. The first in the order of the tensors'
device that does neither runs the call, unless the caller names one, which then runs it or raises with its reason.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import evidence, reference
from .call import Call
from .checks import wrong_value
from .paged import reference as paged_reference
from .paged.call import AppendCall, PagedCall

_INTERPRET_HINT = " (TRITON_INTERPRET=1 interprets it on the CPU)"
_FLOAT64 = "float64 runs in the reference only"
_OLDEST = (8, 0)  # compute capability
_BIASES = ("bias", "row_distance_bias", "col_distance_bias")  # of any floating dtype
_NOT_RUN = "compiled and emulated, this kernel has not run on such a card yet"


class Workers(NamedTuple):
    """What a step of paged attention is divided for."""

    block_rows: int  # of a tile at most
    number: int  # tiles that run at once


class Backend:
    """What runs calls: functions with the arguments of the operators less the backend's name."""

    name: str
    checks_paged_contents = False  # its paged kernels look at lengths and tables themselves
    attention_forward: Callable[..., tuple[Tensor, Tensor]]
    attention_backward: Callable[..., tuple[Tensor, ...]]
    merge_attention: Callable[..., tuple[Tensor, Tensor]]
    paged_attention: Callable[..., None]
    paged_append: Callable[..., None]
    copy_pages: Callable[..., None]

    def missing(self) -> str | None:
        """Why this machine does not have it."""
        return None

    def refuses(self, call: Call) -> str | None:
        """Why it does not take a call; asked only where it is not missing, and so below."""
        return None

    def refuses_merge(self, outs: Sequence[Tensor]) -> str | None:
        return None

    def refuses_paged(self, x: Tensor, call: PagedCall | None) -> str | None:
        """Of paged calls on x's device and dtype; `call` is that of paged_attention, None for paged_append."""
        return None

    def refuses_device(self, x: Tensor) -> str | None:
        """Whatever is done there with whatever numbers."""
        return None

    def paged_workers(self, device: torch.device, heads_kv: int) -> Workers | None:
        """Whom a plan is for; None for the CPU kernels."""
        return None

    def detail(self) -> str:
        """What it is on this machine."""
        return ""

    def tile(self, call: Call) -> str:
        """What it would run a call with; empty where there is nothing to choose."""
        return ""


class ReferenceBackend(Backend):
    name = "reference"
    attention_forward = staticmethod(reference.attention_forward)
    attention_backward = staticmethod(reference.attention_backward)
    merge_attention = staticmethod(reference.merge_attention)
    paged_attention = staticmethod(paged_reference.paged_attention)
    paged_append = staticmethod(paged_reference.paged_append)
    copy_pages = staticmethod(paged_reference.copy_pages)

    def detail(self) -> str:
        return "torch operations on any device; memory grows with seqlen_q * seqlen_k"


def _masked(native: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A native backward, which takes the gradients that are wanted as the bits of a number."""

    def attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
        return native(*arguments[:-1], sum(want << n for n, want in enumerate(arguments[-1])))

    return attention_backward


class KernelBackend(Backend):
    """Kernels of this package."""

    def refuses(self, call: Call) -> str | None:
        return self.refuses_tensor(call.q)

    def refuses_merge(self, outs: Sequence[Tensor]) -> str | None:
        return self.refuses_tensor(outs[0])

    def refuses_paged(self, x: Tensor, call: PagedCall | None) -> str | None:
        return self.refuses_tensor(x)

    def refuses_tensor(self, x: Tensor) -> str | None:
        return _FLOAT64 if x.dtype == torch.float64 else self.refuses_device(x)


class NativeBackend(KernelBackend):
    """Kernels in a library that is built beside the package."""

    library: Path
    namespace: str

    def load(self) -> str | None:
        """Loads the library; why it does not load."""
        try:
            torch.ops.load_library(self.library)
            native = getattr(torch.ops, self.namespace)
            self.attention_forward = native.attention_forward.default
            self.attention_backward = _masked(native.attention_backward.default)
            self.merge_attention = native.merge_attention.default
            self.paged_attention = native.paged_attention.default
            self.paged_append = native.paged_append.default
            self.copy_pages = native.copy_pages.default
        except (OSError, RuntimeError, AttributeError) as error:
            return f"{self.library.name} does not load: {error}"
        return None


class CpuBackend(NativeBackend):
    """The C++ kernels."""

    name = "cpu"
    checks_paged_contents = True
    library = Path(__file__).parent / "libduplex_cpu.so"
    namespace = "duplex_attn_cpu"

    @cache  # noqa: B019  one instance lives as long as the process
    def missing(self) -> str | None:
        if not self.library.exists():
            return f"{self.library.name} is not there: the package was built without a C++ compiler"
        return self.load()

    def refuses(self, call: Call) -> str | None:
        return super().refuses(call) or _refuses_float64(call)

    def refuses_paged(self, x: Tensor, call: PagedCall | None) -> str | None:
        return super().refuses_paged(x, call) or (None if call is None else _refuses_float64(call))

    def refuses_device(self, x: Tensor) -> str | None:
        return None if x.is_cpu else f"it runs on CPU tensors, these are on {x.device}"

    def detail(self) -> str:
        return f"{torch.ops.duplex_attn_cpu.isa(True)}, of {', '.join(torch.ops.duplex_attn_cpu.isas())}"

    def tile(self, call: Call) -> str:
        return torch.ops.duplex_attn_cpu.isa(call.q.dtype == torch.bfloat16)


def _refuses_float64(call: Call | PagedCall) -> str | None:
    """Of what may be of another dtype than q."""
    for name in _BIASES:
        if (x := getattr(call, name)) is not None and x.dtype == torch.float64:
            return f"{name}: {_FLOAT64}"
    return None


class TritonBackend(KernelBackend):
    """The kernels of `duplex_attn.kernels`: on CUDA cards, or interpreted on CPU tensors under TRITON_INTERPRET=1."""

    name = "triton"

    def missing(self) -> str | None:
        if not _is_installed("triton"):
            return "triton is not installed"
        if not _interpreted() and not torch.cuda.is_available():
            return "there is no CUDA card" + _INTERPRET_HINT
        return None

    def refuses_device(self, x: Tensor) -> str | None:
        device = x.device
        if device.type == "cuda":
            return _too_old(_capability(device))
        if device.type == "cpu" and _interpreted():
            return None
        return f"it runs on CUDA tensors, these are on {device}" + _INTERPRET_HINT * (device.type == "cpu")

    def detail(self) -> str:
        return "interpreted" if _interpreted() else torch.cuda.get_device_name()

    def tile(self, call: Call) -> str:
        kernels = self._kernels()
        return str(kernels.forward_tile(call, kernels.tuning.table_for(call.q.device)))

    @cache  # noqa: B019  one instance lives as long as the process
    def _kernels(self, module: str = "attention") -> Any:
        return importlib.import_module(f"{__package__}.kernels.{module}")  # triton is slow to import: when first needed

    def attention_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self._kernels().attention_forward(*arguments)

    def attention_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self._kernels().attention_backward(*arguments)

    def merge_attention(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self._kernels().merge_attention(outs, lses)

    def paged_workers(self, device: torch.device, heads_kv: int) -> Workers | None:
        return self._kernels("paged_calls").planned_workers(device, heads_kv)

    def paged_attention(self, *arguments: Any) -> None:
        self._kernels("paged_calls").paged_attention(*arguments)

    def paged_append(self, *arguments: Any) -> None:
        self._kernels("paged_calls").paged_append(*arguments)

    def copy_pages(self, *arguments: Any) -> None:
        self._kernels("paged_calls").copy_pages(*arguments)


class CudaBackend(NativeBackend):
    """The CUDA C++ kernels, of Hopper and of every other card from Ampere on."""

    name = "cuda"
    library = Path(__file__).parent / "libduplex_cuda.so"
    namespace = "duplex_attn_cuda"
    device_type = "cuda"

    @cache  # noqa: B019  one instance lives as long as the process
    def missing(self) -> str | None:
        if not self.library.exists():
            return f"{self.library.name} is not there: the package was built without nvcc"
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        if not torch.cuda.is_available():
            return "there is no CUDA card"
        cards = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        if reason := _too_old(max(map(_capability, cards))):
            return reason
        if reason := self.load():  # never beside a torch that has no CUDA to give it
            return reason
        driver, built = _driver_version(), torch.ops.duplex_attn_cuda.runtime_version()
        if driver // 1000 < built // 1000:
            return f"the driver is of CUDA {_version(driver)}, the library of {_version(built)}"
        return None

    def refuses(self, call: Call) -> str | None:
        if reason := self._refuses_scores(call):
            return reason
        if call.dropout_p > 0:
            return "its kernels have no dropout"
        return _refuses_rows(q=call.q, k=call.k, v=call.v)

    def refuses_merge(self, outs: Sequence[Tensor]) -> str | None:
        if len(outs) > _MERGE_PARTS:
            return f"it merges up to {_MERGE_PARTS} parts"
        return self.refuses_tensor(outs[0])

    def refuses_paged(self, x: Tensor, call: PagedCall | None) -> str | None:
        if call is None:
            return self.refuses_tensor(x)
        return self._refuses_scores(call) or _refuses_rows(k_pages=call.k_pages, v_pages=call.v_pages)

    def paged_workers(self, device: torch.device, heads_kv: int) -> Workers | None:
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
        return Workers(*torch.ops.duplex_attn_cuda.paged_workers(index, heads_kv))

    def refuses_device(self, x: Tensor) -> str | None:
        if x.device.type != self.device_type:
            return f"it runs on CUDA tensors, these are on {x.device}"
        return _too_old(self.capability(x.device))

    def _refuses_scores(self, call: Call | PagedCall) -> str | None:
        if reason := self.refuses_tensor(call.q):
            return reason
        if call.q.dtype not in (torch.bfloat16, torch.float16):
            return "it takes bfloat16 and float16"
        for name in _BIASES:
            if getattr(call, name) is not None:
                return f"its kernels have no {name}"
        return None

    def detail(self) -> str:
        return "forward, backward and paged calls"

    def tile(self, call: Call) -> str:
        head_dim = max(call.q.shape[-1], call.v.shape[-1])
        major, minor = self.capability(call.q.device)
        tile = torch.ops.duplex_attn_cuda.forward_tile(10 * major + minor, head_dim)
        return tile if (major, minor) == (9, 0) else f"{tile}; {_NOT_RUN}"

    def capability(self, device: torch.device) -> tuple[int, int]:
        return _capability(device)


_MERGE_PARTS = 32  # csrc/cuda/merge.h


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _too_old(card: tuple[int, int]) -> str | None:
    return (
        None
        if card >= _OLDEST
        else f"its kernels are for compute capability 8.0 and later, this card has {card[0]}.{card[1]}"
    )


def _refuses_rows(**tensors: Tensor) -> str | None:
    for name, x in tensors.items():
        if not _has_bulk_rows(x):
            return f"{name}: bulk copies want strides and a first element at multiples of 16 bytes"
    return None


def _has_bulk_rows(x: Tensor) -> bool:
    if x.numel() == 0:
        return True
    strides = [stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def _driver_version() -> int:
    """Of CUDA, as 1000 * major + 10 * minor, from the driver itself: torch has told it in some releases only."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_CPU, _TRITON, _CUDA, _REFERENCE = CpuBackend(), TritonBackend(), CudaBackend(), ReferenceBackend()
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (_CPU, _TRITON, _CUDA, _REFERENCE)}
_ORDER: dict[str, tuple[Backend, ...]] = {"cpu": (_CPU, _REFERENCE), "cuda": (_TRITON, _CUDA, _REFERENCE)}


def names_for(device_type: str) -> list[str]:
    """The backends that such a device could have, in the order in which they are asked where nothing was measured."""
    return [backend.name for backend in _ORDER.get(device_type, (_REFERENCE,))]


@cache
def _candidates(device_type: str) -> tuple[Backend, ...]:
    return tuple(backend for backend in _ORDER.get(device_type, (_REFERENCE,)) if backend.missing() is None)


@cache
def without_kernels(device: torch.device) -> str | None:
    """Why the reference alone would run what lies on a device; None where kernels of the package do."""
    x = torch.empty(0, device=device)
    others = [BACKENDS[name] for name in names_for(device.type) if name != _REFERENCE.name]
    reasons = {backend.name: backend.missing() or backend.refuses_device(x) for backend in others}
    if None in reasons.values():
        return None
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"{device}: expected a device with kernels of this package" + (f" ({told})" if told else "")


@cache
def _is_contested(device_type: str) -> bool:
    """More than one backend beside the reference could run a call there."""
    return len(_candidates(device_type)) > 2


@cache
def _card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _ranked(device: torch.device, shape: str) -> tuple[Backend, ...]:
    """Those that passed their tests on such a card before those that did not; by what was measured there for the class of
    shapes, and the rest in the portable order. The reference, whose memory grows with the square, comes last."""
    card = _card_name(device)
    fastest, failing = evidence.order(card, shape), evidence.failing(card)

    def place(backend: Backend) -> tuple[bool, bool, int]:
        name = backend.name
        return backend is _REFERENCE, name in failing, fastest.index(name) if name in fastest else len(fastest)

    return tuple(sorted(_candidates(device.type), key=place))


def choose(call: Call, name: str) -> Backend:
    """The backend that runs `call`. ValueError when the named one cannot."""
    return _choose(call.q, name, "refuses", (call,), evidence.class_of, (call, "forward"))


def choose_backward(call: Call, name: str) -> Backend:
    """The same for the gradients of `call`."""
    return _choose(call.q, name, "refuses", (call,), evidence.class_of, (call, "backward"))


def choose_merge(outs: Sequence[Tensor], name: str) -> Backend:
    return _choose(outs[0], name, "refuses_merge", (outs,), evidence.class_of_merge, (outs,))


def choose_paged(call: PagedCall, name: str) -> Backend:
    return _choose(call.q, name, "refuses_paged", (call.q, call), evidence.class_of_paged, (call,))


def choose_append(call: AppendCall, name: str) -> Backend:
    return _choose(call.k, name, "refuses_paged", (call.k, None), evidence.class_of_append, (call,))


def choose_copy(k_pages: Tensor, v_pages: Tensor, src: Tensor, name: str) -> Backend:
    return _choose(k_pages, name, "refuses_device", (k_pages,), evidence.class_of_copy, (k_pages, v_pages, src))


def choose_planned(k_pages: Tensor) -> Backend:
    """The backend that plans are made for, before there is a call: that of decoding, which most steps are."""
    return _choose(k_pages, "", "refuses_paged", (k_pages, None), evidence.class_of_decoding, (k_pages,))


def _choose(
    x: Tensor, name: str, refuses: str, asked: tuple[Any, ...], class_of: Callable[..., str], shape: tuple[Any, ...]
) -> Backend:
    """refuses: the method that is asked why not. class_of: of the shape, where there is evidence to go by."""
    if name:
        return _named(name, refuses, asked)
    device_type = x.device.type
    contested = device_type == "cuda" and _is_contested("cuda")
    contenders = _ranked(x.device, class_of(*shape)) if contested else _candidates(device_type)
    for backend in contenders:
        if getattr(backend, refuses)(*asked) is None:
            return backend
    raise AssertionError("the reference refuses nothing")


def _named(name: str, refuses: str, asked: tuple[Any, ...]) -> Backend:
    check_name(name)
    backend = BACKENDS[name]
    reason = backend.missing() or getattr(backend, refuses)(*asked)
    if reason is not None:
        wrong_value("backend", "one that can run this call", f"{name}: {reason}")
    return backend


def check_name(name: str) -> None:
    if name and name not in BACKENDS:
        wrong_value("backend", f"one of {', '.join(BACKENDS)}", name)


@dataclass(frozen=True)
class BackendStatus:
    name: str
    available: bool
    detail: str  # what it is on this machine, or why it is missing

    def __str__(self) -> str:
        return f"{self.name}: {'' if self.available else 'missing, '}{self.detail}"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with what it is on this machine or why the machine lacks it."""
    return {name: _status(backend) for name, backend in BACKENDS.items()}


def _status(backend: Backend) -> BackendStatus:
    try:
        missing = backend.missing()
        return BackendStatus(backend.name, missing is None, backend.detail() if missing is None else missing)
    except ValueError as error:  # the environment asks for an instruction set that is not here
        return BackendStatus(backend.name, False, str(error))


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes. Prints one line a backend."""

    backend: str
    tile: str  # instruction set or kernel configuration; empty where the backend has no choice of one
    refusals: dict[str, str]  # every other backend -> why it does not run the call
    grounds: str = ""  # on a card, what the order of its backends rests on

    def __str__(self) -> str:
        chosen = f"{self.backend}: runs the call" + (f", {self.tile}" if self.tile else "")
        return "\n".join(
            [chosen, *filter(None, [self.grounds]), *(f"{name}: {reason}" for name, reason in self.refusals.items())]
        )


def explain_call(call: Call, name: str) -> Explanation:
    chosen = choose(call, name)
    refusals = {}
    for backend in BACKENDS.values():
        if backend is not chosen:
            refusals[backend.name] = backend.missing() or backend.refuses(call) or _why_not_first(backend, chosen, name)
    device = call.q.device
    grounds = ""
    if device.type == "cuda" and not name:
        grounds = evidence.in_words(_card_name(device), evidence.class_of(call, "forward"))
    return Explanation(chosen.name, chosen.tile(call), refusals, grounds)


def _why_not_first(backend: Backend, chosen: Backend, name: str) -> str:
    return f"could run it, {chosen.name} was asked for" if name else f"could run it, {chosen.name} comes first"
