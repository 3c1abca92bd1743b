"""The backends under test, each as its own lane: a name, the device it runs on and, for the CPU, the instruction set forced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import duplex_attn as da
import torch
from duplex_attn.backends import names_for
from torch import Tensor

from .oracle import GRADIENTS, Answer, Call

T = TypeVar("T")
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
EMULATED_AMX = "amx_emulated"


@dataclasses.dataclass(frozen=True)
class Lane:
    backend: str
    isa: str = ""
    device: str = "cpu"

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.isa, self.device if self.device != "cpu" else "")))

    @property
    def slow(self) -> bool:
        """The interpreter takes milliseconds for a tile, so large shapes are not for it."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def examples(self) -> int:
        """How many a random test tries. Interpreted, a call and its gradients take up to four seconds; compiled for a card, where
        each shape needs kernels of its own, up to twenty."""
        return 10 if self.slow else 3 if self.backend == "triton" else 100


_FRESH_STACK = ThreadPoolExecutor(1)
CPU_LANES = [Lane("reference"), *(Lane("cpu", isa) for isa in ISAS), Lane("triton")]
GPU_LANES = [Lane(name, device="cuda") for name in names_for("cuda")] if torch.cuda.is_available() else []


@cache
def missing(lane: Lane) -> str | None:
    """Why this machine has not this lane; the fixture `lane` skips with it."""
    if lane.slow and os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET is not set: a CUDA card is there, use -m gpu"
    status = da.backends()[lane.backend]
    if not status.available or not lane.isa:
        return None if status.available else status.detail
    return None if forced(lane) in (*supported(), EMULATED_AMX) else f"this CPU has only {', '.join(supported())}"


def supported() -> list[str]:
    """The instruction sets of this CPU."""
    return torch.ops.duplex_attn_cpu.isas() if da.backends()["cpu"].available else []


def forced(lane: Lane) -> str:
    """What DUPLEX_ATTN_ISA says for it. A matrix unit that is not here is emulated, by instructions that have to be."""
    emulated = lane.isa == "amx" not in supported() and "avx512_bf16" in supported()
    return EMULATED_AMX if emulated else lane.isa


def repeats_another(lane: Lane, dtypes: set[torch.dtype]) -> bool:
    """The matrix unit multiplies bfloat16 alone: tests of other dtypes are those of the instruction set below it."""
    return lane.isa == "amx" and bool(dtypes) and torch.bfloat16 not in dtypes


def run(
    call: Call,
    lane: Lane,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    constants: tuple[str, ...] = (),
) -> Answer:
    """The package's answer to a call: out and lse, with `dout` every gradient too but those of `constants`. Strides stay as
    they are on the CPU."""
    return on_own_stack(lane, lambda: _run(call, lane, dout, dlse, deterministic, batch_invariant, constants))


def on_own_stack(lane: Lane, work: Callable[[], T]) -> T:
    """Python maps and unmaps memory at each call that crosses a certain depth of its stack, and the interpreter does so all the time
    below pytest: a stack of its own makes it several times faster."""
    return _FRESH_STACK.submit(work).result() if lane.slow else work()


def _run(
    call: Call,
    lane: Lane,
    dout: Tensor | None,
    dlse: Tensor | None,
    deterministic: bool | None,
    batch_invariant: bool,
    constants: tuple[str, ...],
) -> Answer:
    variables = set(GRADIENTS) - set(constants) if dout is not None else set()
    moved = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    for name, x in moved.items():
        if isinstance(x, Tensor):
            x = on(x, lane.device).detach()
            moved[name] = x.requires_grad_(name in variables and x.is_floating_point())
    call = Call(**moved)
    mask = da.Mask(call.prefix, call.left, call.right, "top_left" if call.top_left else "bottom_right")
    options = {
        name: getattr(call, name)
        for name in (
            "bias",
            "distance_bias",
            "alibi_slopes",
            "row_distance_bias",
            "col_distance_bias",
            "sink",
            "scale",
            "softcap",
            "dropout_p",
        )
    } | {
        "return_lse": True,
        "deterministic": deterministic,
        "batch_invariant": batch_invariant,
        "backend": lane.backend,
    }
    options["seed"] = call.seed if call.dropout_p > 0 else None
    if call.cu_seqlens_q is not None:
        longest = [int(torch.diff(cu).max()) if len(cu) > 1 else 0 for cu in (call.cu_seqlens_q, call.cu_seqlens_k)]
        out, lse = da.varlen_attention(
            call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, *longest, mask, **options
        )
    else:
        lengths = {name: getattr(call, name) for name in ("seqlens_q", "seqlens_k", "starts_q", "starts_k")}
        out, lse = da.attention(call.q, call.k, call.v, mask, **lengths, **options)
    result = {"out": out.detach(), "lse": lse.detach()}
    if dout is None:
        return result
    leaves = {n: x for n in GRADIENTS if isinstance(x := getattr(call, n), Tensor) and x.requires_grad}
    outputs, grads = (
        ((out,), (on(dout, lane.device),))
        if dlse is None
        else ((out, lse), (on(dout, lane.device), on(dlse, lane.device)))
    )
    return result | {
        f"d{n}": x for n, x in zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True)
    }


def on(x: Tensor, device: str) -> Tensor:
    """x on the device with its strides and all that lies around it; itself where it is there already."""
    return x if x.device.type == device else copied(x, device)


def copied(x: Tensor, device: str) -> Tensor:
    return around(x).to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def around(x: Tensor) -> Tensor:
    """All of x's storage, in one dimension."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def written_on(lane: Lane, function: Callable[..., None], *arguments: object, **options: object) -> None:
    """A call that writes in place, made on copies on the lane's device; what it left there is then in the arguments."""
    tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
    copies = {id(x): copied(x, lane.device) for x in tensors}
    moved = [copies.get(id(x), x) for x in arguments]
    function(*moved, **{name: copies.get(id(x), x) for name, x in options.items()}, backend=lane.backend)
    for x in tensors:
        around(x).copy_(around(copies[id(x)]))
