"""Processes of one group, started once: each does a job, a function of this file, and answers what it returned or raised.

The tests use `Ranks`; a rank runs this file as a program.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, count
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duplex_attn as da
import torch
import torch.distributed as dist
from duplex_attn.integrations import distributed
from duplex_attn.integrations.distributed import context_parallel_attention, shard, unshard
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

PATIENCE = 60  # seconds


class Ranks:
    """Of a group on this machine, over gloo."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world
        address = str(folder / "jobs")
        with Listener(address) as listener:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, str(folder / "store"), str(world), address]
            self.process = subprocess.Popen(command, env=environment)
            connections = [listener.accept() for _ in range(world)]
        self.connections = [c for _, c in sorted((c.recv(), c) for c in connections)]

    def answers(self, job: str, **arguments: Any) -> list[tuple[Any, str | None]]:
        """What each rank returned, and the error that it raised instead."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((job, arguments)))  # its own send would hand over memory, not copies
        for rank, connection in enumerate(self.connections):
            assert connection.poll(PATIENCE), f"{job}: rank {rank} of {self.world} does not answer"
        return [pickle.loads(connection.recv_bytes()) for connection in self.connections]

    def run(self, job: str, **arguments: Any) -> list[Any]:
        answers = self.answers(job, **arguments)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [value for value, _ in answers]

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()  # a rank that has no more jobs ends
        self.process.wait(PATIENCE)


def attend(
    call: dict[str, Any], sharding: str, dout: Tensor, dlse: Tensor | None, heads_first: bool = False, **options: Any
) -> dict[str, Any]:
    """The whole results, and what this rank did for them."""
    mask = da.Mask(call.pop("prefix"), call.pop("left"), call.pop("right"), call.pop("align"))
    for name in ("q", "k", "v"):
        x = shard(call[name], sharding=sharding)
        call[name] = x.transpose(1, 2).contiguous().transpose(1, 2) if heads_first else x
    leaves = {n: call[n].requires_grad_() for n in ("q", "k", "v", "distance_bias", "sink") if call.get(n) is not None}
    with watched() as done:
        out, lse = context_parallel_attention(mask=mask, sharding=sharding, return_lse=True, **call, **options)
        done.append("backward")
        outputs, given = [out], [shard(dout, sharding=sharding)]
        if dlse is not None:
            outputs, given = [out, lse], [*given, shard(dlse, dim=2, sharding=sharding)]
        grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), given), strict=True))
    result = {"out": unshard(out, sharding=sharding), "lse": unshard(lse, dim=2, sharding=sharding), "done": done}
    for name, x in grads.items():
        assert x.dtype == leaves[name].dtype
        if name in ("q", "k", "v"):
            result[f"d{name}"] = unshard(x, sharding=sharding)
        else:
            dist.all_reduce(total := x.float())
            result[f"d{name}"] = total
    return result


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is computed and sent, in order."""
    done: list[str] = []
    names = {"attention_forward": "compute", "attention_backward": "compute"}
    functions = {name: getattr(distributed, name) for name in names}

    def watch(what: str, function: Any) -> Any:
        def spy(*arguments: Any) -> Any:
            done.append(what)
            return function(*arguments)

        return spy

    send = dist.batch_isend_irecv
    for name, what in names.items():
        setattr(distributed, name, watch(what, functions[name]))
    dist.batch_isend_irecv = watch("send", send)
    try:
        yield done
    finally:
        dist.batch_isend_irecv = send
        for name, function in functions.items():
            setattr(distributed, name, function)


def tokens(seed: int = 0, rows: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """This rank's part of small sequences."""
    g = torch.Generator().manual_seed(seed)
    whole = {
        name: torch.randn(1, rows * dist.get_world_size(), 2, 8, generator=g).to(dtype) for name in ("q", "k", "v")
    }
    return {name: shard(x) for name, x in whole.items()}


def call(last: dict[str, Any] | None = None, gradients: bool = False, **changed: Any) -> None:
    """A call with arguments of its own, and others on the last rank."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    arguments = tokens() | changed | ((last or {}) if is_last else {})
    for name in ("q", "k", "v"):
        if gradients and isinstance(arguments[name], Tensor):
            arguments[name] = arguments[name].requires_grad_()
    context_parallel_attention(**arguments)


def there_and_back(x: Tensor, dim: int, sharding: str) -> tuple[Tensor, Tensor]:
    part = shard(x, dim=dim, sharding=sharding)
    return part, unshard(part, dim=dim, sharding=sharding)


def gather(**last: Any) -> Tensor:
    is_last = dist.get_rank() == dist.get_world_size() - 1
    return unshard(**({"x": torch.zeros(1, 4, 2)} | (last if is_last else {})))


def another_call_on_the_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        unshard(torch.zeros(1, 4, 2))
    else:
        call()


def collectives_of_a_call() -> list[tuple[int, ...]]:
    """Besides what is sent: of each all-gather, what a rank gives."""
    with (
        patch.object(dist, "all_gather", wraps=dist.all_gather) as tensors,
        patch.object(dist, "all_gather_object") as objects,
    ):
        call()
    assert not objects.called
    return [tuple(gathered.args[1].shape) for gathered in tensors.call_args_list]


def cut(rows: int, sharding: str) -> Tensor:
    return shard(torch.zeros(1, rows), sharding=sharding)


def saved_for_backward() -> int:
    """Bytes."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = {name: x.requires_grad_() for name, x in tokens(rows=16).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        context_parallel_attention(**inputs)
    return sum(kept.values())


def most_memory(dtype: torch.dtype, sharding: str) -> tuple[float, float]:
    """Held at most in forward, its results among it, and in backward, in tensors like q in float32."""
    inputs = {name: x.requires_grad_() for name, x in tokens(rows=2048, dtype=dtype).items()}
    given = torch.ones_like(inputs["q"])

    def most(work: Any) -> tuple[Any, float]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        return result, max(accumulate(changes)) / (4 * inputs["q"].numel())

    out, forward = most(lambda: context_parallel_attention(mask=da.causal(), sharding=sharding, **inputs))
    return forward, most(lambda: torch.autograd.grad(out, list(inputs.values()), given))[1]


def sent_and_still_held(dtype: torch.dtype) -> list[str]:
    """What is computed, forward and backward, while memory is held that was sent on and waited for, or, when results
    are put together, that was sent at all. This rank's own k and v apart."""
    inputs = {name: x.requires_grad_() for name, x in tokens(dtype=dtype).items()}
    own = {x.untyped_storage().data_ptr() for x in inputs.values()}
    exchanged: list[StorageWeakRef] = []
    waited: list[StorageWeakRef] = []
    found: list[str] = []

    class Awaited:
        def __init__(self, work: dist.Work, sent: StorageWeakRef | None) -> None:
            self.work, self.sent = work, sent

        def wait(self) -> None:
            self.work.wait()
            if self.sent is not None:
                waited.append(self.sent)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            refs = exchanged if operator is torch.ops.aten.cat.default else waited
            found.extend(str(operator) for x in refs if not x.expired())
            return operator(*args, **kwargs or {})

    send = dist.batch_isend_irecv

    def spy(operations: list[dist.P2POp]) -> list[Any]:
        refs = [StorageWeakRef(x.tensor.untyped_storage()) for x in operations]
        are_own = [x.tensor.untyped_storage().data_ptr() in own for x in operations]
        exchanged.extend(x for x, is_own in zip(refs, are_own, strict=True) if not is_own)
        sent = [
            x if operation.op is dist.isend and not is_own else None
            for x, operation, is_own in zip(refs, operations, are_own, strict=True)
        ]
        return [Awaited(*pair) for pair in zip(send(operations), sent, strict=True)]

    dist.batch_isend_irecv = spy
    try:
        with Watch():
            out = context_parallel_attention(**inputs)
            torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    finally:
        dist.batch_isend_irecv = send
    assert len(waited) == 2 * (3 * dist.get_world_size() - 4) * (dist.get_world_size() > 1)
    return found


def fails_midway(where: str, at: int, error: str | None) -> dict[str, Any]:
    """Forward, and backward if `where` is, of which the last rank's computation number `at` raises the error."""
    fails = error is not None and dist.get_rank() == dist.get_world_size() - 1
    inputs = {name: x.requires_grad_() for name, x in tokens().items()}
    result: dict[str, Any] = {"error": None}
    numbers, function = count(), getattr(distributed, where)

    def failing(*arguments: Any) -> Any:
        if next(numbers) == at and fails:
            raise getattr(builtins, str(error))("in the middle of the ring")
        return function(*arguments)

    setattr(distributed, where, failing)
    try:
        result["out"] = out = context_parallel_attention(**inputs)
        if where == "attention_backward":
            result |= zip(("dq", "dk", "dv"), torch.autograd.grad(out.sum(), list(inputs.values())), strict=True)
    except BaseException as raised:
        result["error"] = type(raised).__name__
    finally:
        setattr(distributed, where, function)
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in result.items()}


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dx: Tensor) -> None:
        return None


def none_for_the_last(none: bool) -> list[Tensor]:
    """Gradients where the last rank's results have none, or one of zeros."""
    inputs = {name: x.requires_grad_() for name, x in tokens().items()}
    out = context_parallel_attention(mask=da.causal(), **inputs)
    if dist.get_rank() == dist.get_world_size() - 1:
        out = NoGradient.apply(out) if none else out * 0
    return list(torch.autograd.grad(out.sum(), list(inputs.values())))


def without_gradients(dtype: torch.dtype, batch: int = 1, rows: int = 4) -> Tensor:
    inputs = {name: x.repeat(batch, 1, 1, 1) for name, x in tokens(rows=rows, dtype=dtype).items()}
    return unshard(context_parallel_attention(mask=da.causal(), **inputs))


def in_autocast() -> tuple[torch.dtype, torch.dtype, Tensor]:
    inputs = {name: x.requires_grad_() for name, x in tokens().items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = context_parallel_attention(mask=da.causal(), **inputs)
    out.float().sum().backward()
    return out.dtype, inputs["q"].grad.dtype, unshard(out)


def compiled() -> float:
    """How far off what is compiled is."""
    inputs = tokens()

    @torch.compile(backend="eager")
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return context_parallel_attention(q * 2, k, v, da.causal()) + 1

    expected = context_parallel_attention(inputs["q"] * 2, inputs["k"], inputs["v"], da.causal()) + 1
    return float((layer(**inputs) - expected).abs().max())


def twice() -> None:
    inputs = {name: x.requires_grad_() for name, x in tokens().items()}
    (dq,) = torch.autograd.grad(context_parallel_attention(**inputs).sum(), inputs["q"], create_graph=True)
    dq.sum().backward()


def of_only(out_counts: bool) -> list[Tensor]:
    """Gradients where only out, or only lse, has one."""
    inputs = {name: x.requires_grad_() for name, x in tokens().items()}
    out, lse = context_parallel_attention(mask=da.causal(), return_lse=True, **inputs)
    grads = torch.autograd.grad((out if out_counts else lse).sum(), list(inputs.values()))
    return [unshard(x) for x in grads]


def in_group(members: list[int]) -> Tensor | None:
    """Of some ranks alone, which have other numbers in it."""
    group = dist.new_group(members)
    x = {name: shard(torch.full((1, 4 * len(members), 1, 8), 0.1).cumsum(1), group) for name in ("q", "k", "v")}
    out = context_parallel_attention(mask=da.causal(), group=group, **x)
    return unshard(out, group)


def serve(store: str, world: int, address: str, rank: int) -> None:
    """Ends where the tests have no more jobs."""
    waiting = timedelta(seconds=PATIENCE // 2)
    dist.init_process_group("gloo", f"file://{store}", world_size=world, rank=rank, timeout=waiting)
    with Client(address) as connection:
        connection.send(rank)
        while True:
            try:
                job, arguments = pickle.loads(connection.recv_bytes())
            except EOFError:
                break
            try:
                answer = globals()[job](**arguments), None
            except Exception as error:
                answer = None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


if __name__ == "__main__":
    store, world, address = sys.argv[1:]
    fork = multiprocessing.get_context("fork")  # torch is imported once; it has no threads yet
    ranks = [fork.Process(target=serve, args=(store, int(world), address, rank)) for rank in range(int(world))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
