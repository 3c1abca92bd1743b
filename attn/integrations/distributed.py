"""Context parallelism: sequences longer than one device holds, their tokens divided among the ranks of a process group.

    ids, positions = shard(ids, group), shard(torch.arange(seqlen), group, dim=0)   # a model's inputs, once
    out = context_parallel_attention(q, k, v, duplex_attn.causal(), group=group)    # in each layer

Ring attention (Liu et al. 2023): queries stay, keys and values go round. What a rank's queries see of the keys at hand is
again a span, counted from the first of these keys, so the kernels need nothing else; results are put together by their
log-sum-exp. A ring rather than an all-gather, since its memory does not grow with the number of ranks and the next keys
arrive while these are used.

sharding="balanced" gives rank r of W the chunks r and 2W-1-r of 2W, so that all have as much of a causal mask to compute
(as Llama 3 does, Grattafiori et al. 2024; Brandon et al. 2023 stripe tokens for it); "contiguous" gives it chunk r of W.
`shard`, `unshard` and attention cannot know of each other's: name the same.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import pairwise, product
from operator import index
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import choose, choose_backward
from ..call import Call
from ..checks import check_attention, contents_are_readable, wrong_value
from ..functional import check_numbers, check_tensor, merge_attention, named_mask, prefix_tensor, table
from ..mask import Mask, full
from ..ops import attention_backward, attention_forward
from .chunks import Division, Part, add_by_distance, by_distance, chunks_of, steps

Group = dist.ProcessGroup | None
Sharding = Literal["balanced", "contiguous"]
_FULL = full()


@torch.compiler.disable
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = _FULL,
    *,
    group: Group = None,
    sharding: Sharding = "balanced",
    distance_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """`duplex_attn.attention` over whole sequences, of which each of W ranks holds a part; exact and differentiable.

    q (B, Sq / W, Hq, D), k (B, Sk / W, Hkv, D), v (B, Sk / W, Hkv, Dv): this rank's rows, as `shard` gives them.
        float32, float16 or bfloat16 (float64 without gradients).
    mask: that of the whole sequences; a prefix (B,) holds the same on every rank.
    group: all ranks by default. All else as in `attention`, on every rank the same.

    Returns out (B, Sq / W, Hq, Dv), and with return_lse also lse (B, Hq, Sq / W), float32; both are differentiable.
    Gradients of distance_bias and sink are the share of this rank's queries, as those of weights are: sum over the group.

    Every rank of the group makes the call, and its backward, in the same order. Each sends k and v W-1 times; in backward
    as often, and W times their gradients, in float32. Steps of the ring in which no rank sees anything are left out: a
    sliding window shorter than a chunk takes two sends at most, whatever W. What the mask hides of a step is not computed;
    a prefix tensor is not read, and kernels skip what lies behind it.
    Held at most, besides inputs and results: k and v twice, out three times in float32; in backward k and v twice, dq
    once, dk and dv three times, these in float32, and a part's gradients, with what the operator needs for them. Nothing
    of other ranks is kept from forward to backward.
    Gradients' bits repeat where those of `attention` do. Under torch.compile the call runs as it is, uncompiled. With
    NCCL, torch wants `torch.cuda.set_device` called before.

    Raises what `attention` raises; ValueError for an odd number of rows with "balanced", for gradients where only the
    reference backend takes the call, for a group without this rank, and where shapes, dtypes, mask or numbers differ
    between ranks. On the CPU what one rank refuses, or has unlike the others, raises the same on every rank before
    anything is sent, which costs an all-gather of 16 bytes a call. On a GPU reading these would wait for the device: only
    under DUPLEX_ATTN_CHECK=1, on every rank the same. Without it, and of a second derivative or an argument of no such
    name always, the rank raises alone, and the others wait for it until the timeout of the group.

    A rank that fails while it computes (out of memory, KeyboardInterrupt) still passes on what the others wait for, then
    raises, and the group can be used again: a posted send cannot be taken back, and without the later ones the others
    would wait, or take those of another call for them. They return as if nothing were wrong, but for dk and dv in
    backward, which lack that rank's share and are NaN. What fails of the exchange itself (another rank is gone, no memory
    for what arrives, an interrupt there) raises at once: what is under way is dropped, and the group is to be destroyed.
    """
    _, world = _place(group)
    with _alike(group, q, k, v) as given:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x)
            if x.dim() != 4:
                wrong_value(name, "(batch, seqlen, heads, head_dim)", x.shape)
        check_numbers(scale=scale, softcap=softcap)
        prefix, left, right, top_left = named_mask(mask)
        if torch.is_autocast_enabled(q.device.type):
            to = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(to) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
        chunks = _chunks(sharding)
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] % chunks:
                wrong_value(name, 'an even number of rows with sharding="balanced"', x.shape[1])
        dtype = torch.promote_types(q.dtype, torch.float32)
        call = Call(
            q, k, v, None, None, q.shape[1], k.shape[1], None, None, None, None,
            prefix if isinstance(prefix, Tensor) else prefix_tensor(prefix, len(q), q), left, right, top_left, None,
            table("distance_bias", distance_bias, dtype), table("alibi_slopes", alibi_slopes, dtype), None, None,
            table("sink", sink, dtype), scale, softcap, 0.0, None,
            torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic, False,
        )  # fmt: skip
        check_attention(call)
        choose(call, backend or "")
        inputs = {"q": q, "k": k, "v": v, "distance_bias": distance_bias, "alibi_slopes": alibi_slopes, "sink": sink}
        with_gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs.values())
        if with_gradients and choose_backward(call, backend or "").name == "reference":  # takes no lse of other keys
            expected, got = "kernels, where gradients are wanted", "the reference, which alone takes this call here"
            wrong_value("backend", expected, got)
        read = isinstance(prefix, Tensor) and contents_are_readable(prefix)
        given |= {"call": "attention", **{name: _described(x) for name, x in inputs.items()}}
        given |= {"mask": (prefix.tolist() if read else _described(prefix), left, right, mask.align)}
        given |= {"sharding": sharding, "scale": scale, "softcap": softcap, "requires_grad": with_gradients}

    first_position = 0 if top_left else (k.shape[1] - q.shape[1]) * world
    known_prefix = None if isinstance(prefix, Tensor) else index(prefix)
    rows, keys = q.shape[1] // chunks, k.shape[1] // chunks
    division = Division(world, chunks, rows, keys, first_position, known_prefix, left, right)
    terms = call.prefix, call.distance_bias, call.alibi_slopes, call.sink
    out, lse = _RingAttention.apply(_Ring(group, division, call[-6:], backend or ""), q, k, v, *terms)
    return (out, lse) if return_lse else out


def shard(x: Tensor, group: Group = None, *, dim: int = 1, sharding: Sharding = "balanced") -> Tensor:
    """This rank's rows, along `dim`, of a tensor that every rank has whole. A copy; differentiable.

    Raises ValueError where there is no equal number for each of W ("contiguous") or 2W ("balanced") chunks.
    """
    rank, world = _place(group)
    chunks = _chunks(sharding)
    check_tensor("x", x)
    if x.shape[dim] % (chunks * world):
        wrong_value("x", f"a multiple of {chunks * world} rows in dimension {dim}", x.shape[dim])
    parts = x.tensor_split(chunks * world, dim)
    return torch.cat([parts[n] for n in chunks_of(rank, world, chunks)], dim)


@torch.no_grad()
def unshard(x: Tensor, group: Group = None, *, dim: int = 1, sharding: Sharding = "balanced") -> Tensor:
    """The whole tensor, on every rank, of which each rank holds what `shard` gives it. Has no gradient.

    An all-gather: W-1 parts arrive at each rank. Raises as `context_parallel_attention` does, on the same ranks.
    """
    _, world = _place(group)
    with _alike(group, x) as given:
        chunks = _chunks(sharding)
        check_tensor("x", x)
        if x.shape[dim] % chunks:
            wrong_value("x", 'an even number of rows with sharding="balanced"', x.shape[dim])
        given |= {"call": "unshard", "x": _described(x), "dim": dim, "sharding": sharding}
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(gathered, x.contiguous(), group)
    parts: dict[int, Tensor] = {}
    for rank, rows in enumerate(gathered):
        parts |= zip(chunks_of(rank, world, chunks), rows.tensor_split(chunks, dim), strict=True)
    return torch.cat([parts[n] for n in sorted(parts)], dim)


def _place(group: Group) -> tuple[int, int]:
    """(rank, world size)"""
    rank = dist.get_rank(group)
    if rank < 0:
        wrong_value("group", "one that has this rank", "one without it")
    return rank, dist.get_world_size(group)


def _chunks(sharding: str) -> int:
    """Of a rank."""
    if sharding not in ("balanced", "contiguous"):
        wrong_value("sharding", '"balanced" or "contiguous"', sharding)
    return 2 if sharding == "balanced" else 1


def _described(x: Any) -> Any:
    return (tuple(x.shape), str(x.dtype)) if isinstance(x, Tensor) else x


@contextmanager
def _alike(group: Group, *tensors: object) -> Iterator[dict[str, Any]]:
    """Around what checks a call, and puts into the dict what must be the same on every rank: raises on all of them what
    it raises on one. Ranks called unlike each other would wait for what is never sent, or take it for something else."""
    given: dict[str, Any] = {}
    readable = all(contents_are_readable(x) for x in tensors if isinstance(x, Tensor))
    try:
        yield given
    except Exception as error:
        if readable:
            _compare(group, {"refused": (type(error).__name__, str(error))})
        raise
    if readable:
        _compare(group, given)


def _compare(group: Group, given: dict[str, Any]) -> None:
    """A digest finds what differs; only then is it gathered whole, and said."""
    world, devices = dist.get_world_size(group), dist.get_backend_config(group)
    digest = blake2b(repr(given).encode(), digest_size=16).digest()
    own = torch.tensor(list(digest), dtype=torch.uint8, device="cpu" if "cpu" in devices else devices.split(":")[0])
    digests = own.new_empty(world, len(own))
    dist.all_gather(list(digests), own, group)
    if (digests == own).all():
        return
    everywhere: list[Any] = [None] * world
    dist.all_gather_object(everywhere, given, group)
    for rank, x in enumerate(everywhere):
        if "refused" in x:
            kind, message = x["refused"]
            raise getattr(builtins, kind, RuntimeError)(f"{message} on rank {rank}")
    for name, rank in product(given, range(world)):
        first, x = everywhere[0][name], everywhere[rank][name]
        if x != first:
            wrong_value(name, f"the same on every rank, {first} as on rank 0", f"{x} on rank {rank}")


class _Exchange:
    """Tensors on their way to the rank `by` ahead, and those of the rank as far behind on their way here. What is sent is
    held until waited for: gloo does not say sooner that a send is complete, and with NCCL the host runs ahead of it."""

    def __init__(self, tensors: Sequence[Tensor], by: int, group: Group) -> None:
        rank, world = _place(group)
        self.sent = self.arriving = [x.contiguous() for x in tensors]
        self.works: list[dist.Work] = []
        if by % world and any(x.numel() for x in tensors):
            self.arriving = [torch.empty_like(x) for x in self.sent]
            sends = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + by) % world) for x in self.sent]
            receives = [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - by) % world) for x in self.arriving]
            self.works = dist.batch_isend_irecv(sends + receives)

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        arrived = self.arriving
        self.sent, self.arriving, self.works = [], [], []
        return arrived

    def add_to(self, *totals: Tensor) -> None:
        for total, x in zip(totals, self.wait(), strict=False):
            total += x


class _Ring(NamedTuple):
    """What is alike in every part of a call."""

    group: Group
    division: Division
    options: tuple[Any, ...]  # the last of a Call's arguments
    backend: str

    def go_round(self, visit: Callable[..., None], *tensors: Tensor, summed: bool = False) -> list[Tensor]:
        """Calls visit(part, *tensors at hand, *sums over their visits), and returns the sums of this rank's tensors."""
        sums: list[Tensor] = []
        rounds = self._rounds(tensors, summed)
        try:
            for parts, held, sums in rounds:
                for part in parts:
                    visit(part, *held, *sums)
        except BaseException:
            for x in sums:
                x.fill_(torch.nan)
            for *_, sums in rounds:  # other ranks wait for what goes through this one, and now lacks its share
                for x in sums:
                    x.fill_(torch.nan)
            raise
        return sums

    def _rounds(
        self, tensors: Sequence[Tensor], summed: bool
    ) -> Iterator[tuple[Iterable[Part], list[Tensor], list[Tensor]]]:
        """What is seen of the tensors at hand, and these; meanwhile the next ones arrive, which take their places in the
        list: whoever keeps no other name for them keeps no memory. With them the sums, in float32, which follow them a
        step behind; at last, with nothing to see, those that have come home."""
        rank, held = dist.get_rank(self.group), list(tensors)
        carried = _Exchange((), 0, self.group)
        for step, following in pairwise((*steps(self.division), 0)):
            arriving = _Exchange(held, following - step, self.group) if following else None
            sums = [torch.zeros_like(x, dtype=torch.float32) for x in tensors] if summed else []
            yield self.division.parts(rank, step), held, sums
            carried.add_to(*sums)
            carried = _Exchange(sums, following - step, self.group)  # to where their keys are by then
            held[:] = arriving.wait() if arriving else held
        yield (), [], carried.wait()

    def call(self, part: Part, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor, *biases: Tensor | None) -> Call:
        q, k, v = q[:, part.rows], k[:, part.keys], v[:, part.keys]
        prefix_here = None if part.prefix == 0 else prefix.clamp(min=part.first_key) - part.first_key
        table_here = by_distance(part.shift, max(q.shape[1], k.shape[1]) - 1, *biases)
        return Call(
            q, k, v, None, None, q.shape[1], k.shape[1], None, None, None, None, prefix_here, part.left, part.right, True,
            None, table_here, None, None, None, None, *self.options,
        )  # fmt: skip


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ring, q, k, v, prefix, distance_bias, slopes, sink):
        dtype = torch.promote_types(q.dtype, torch.float32)
        batch, heads, width = len(q), q.shape[2], v.shape[3]
        rows, chunks = ring.division.rows, ring.division.chunks
        lse = q.new_full((heads,), -torch.inf, dtype=dtype) if sink is None else sink  # here a sink counts once
        lses = [lse[:, None].expand(batch, heads, rows).contiguous()] * chunks
        outs = [q.new_zeros(batch, rows, heads, width, dtype=dtype)] * chunks

        def merge(part, k, v):
            n = part.chunk
            out, lse = attention_forward(*ring.call(part, q, k, v, prefix, distance_bias, slopes), ring.backend)
            outs[n], lses[n] = merge_attention([outs[n], out.to(dtype)], [lses[n], lse])

        ring.go_round(merge, k, v)
        out, lse = torch.cat(outs, 1).to(q.dtype), torch.cat(lses, 2)
        ctx.save_for_backward(out, lse, q, k, v, prefix, distance_bias, slopes, sink)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():  # create_graph: what came over the ring would be a constant in silence
            raise RuntimeError("duplex_attn: attention has no second derivatives; differentiate it once")
        out, lse, q, k, v, prefix, distance_bias, slopes, sink = ctx.saved_tensors
        *_, wants_table, _, wants_sink = ctx.needs_input_grad
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        wanted = [True, True, True, False, wants_table, False, False, False]
        dtable = torch.zeros_like(distance_bias) if wants_table else None
        dq = torch.zeros_like(q, dtype=torch.float32)

        def add_gradients(part, k, v, dk, dv):
            rows = part.rows
            of_rows = dout[:, rows], dlse[..., rows], out[:, rows], lse[..., rows]  # the last two over all keys
            call = ctx.ring.call(part, q, k, v, prefix, distance_bias, slopes)
            grads = list(attention_backward(*of_rows, *call, wanted, ctx.ring.backend))
            for total in (dq[:, rows], dk[:, part.keys], dv[:, part.keys]):
                total += grads.pop(0)
            if dtable is not None:
                add_by_distance(dtable, grads[1], part.shift)

        dk, dv = ctx.ring.go_round(add_gradients, k, v, summed=True)
        dsink = None
        if wants_sink:
            dscores = dlse - (dout.to(lse.dtype) * out).sum(-1).mT  # dlse - delta, (B, Hq, Sq)
            share = torch.exp(sink[:, None] - lse.masked_fill(lse == -torch.inf, 0))
            dsink = (share * dscores).sum((0, 2))
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, dtable, None, dsink
