"""A paged KV cache: keys and values of many sequences in one pool of pages, shared where they are the same.

Which sequence has which pages is decided in C++ (csrc/runtime); here are the tensors, and what moves their contents.
A step of generation reads: `append` or `extend` the new tokens, make a `batch`, run the model over it, `commit` it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import huge_pages
from .backends import Workers, choose_planned
from .checks import MAX_HEAD_DIM, wrong_type, wrong_value
from .mask import Mask
from .paged.call import MAX_PAGE_SIZE
from .paged.functional import copy_pages, plan, plan_capacity

try:
    from . import _runtime
except ImportError as error:
    raise ImportError(
        "PagedKVCache needs duplex_attn._runtime, which this installation was built without: install a C++ compiler "
        f"and Python's development headers, then duplex-attn again ({error})"
    ) from error

from ._runtime import OutOfPages, Sequence

__all__ = ["CacheStats", "OutOfPages", "PagedBatch", "PagedKVCache", "Sequence"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_QUANTIZATIONS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


@dataclass(frozen=True)
class CacheStats:
    """A cache at one moment. Pages are used, cached or free, and these sum up to `pages_total`."""

    pages_total: int
    pages_used: int  # by sequences
    pages_shared: int  # of the used ones, by more than one sequence
    pages_cached: int  # by none, kept for prompts to come; taken when no page is free
    pages_free: int
    slots_wasted: int  # allocated and unused: of used pages, those of no token
    waste: float  # of all slots of used pages
    sequences: int
    swapped: int  # of the sequences, those in host memory
    lookup_tokens: int  # of all prompts since the cache was made
    hit_tokens: int  # of those, found in the cache
    bytes: int  # of all pages and scales
    bytes_used: int  # of the used pages
    bytes_swapped: int  # in host memory

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


@dataclass(eq=False)
class PagedBatch:
    """What every layer of a step reads. Row b computes tokens positions[cu_seqlens_q[b] : cu_seqlens_q[b + 1]].

    A batch in fixed buffers (`PagedKVCache.buffers`) may be smaller than they are: sequences past it have no keys and
    no queries, positions past it are -1, and `max_seqlen_q` and `max_seqlen_k` are those of the batch.
    """

    block_table: Tensor  # int32 (B, pages of the longest sequence); past a sequence's own pages, 0
    seqlens_k: Tensor  # int32 (B,), the new tokens included
    cu_seqlens_q: Tensor  # int32 (B + 1,)
    positions: Tensor  # int32 (new tokens,)
    max_seqlen_q: int
    max_seqlen_k: int
    seqs: tuple[Sequence, ...]
    page_size: int
    _memory: _Memory  # holds the four tensors
    _host: tuple[Tensor, ...]  # the four of them on the CPU
    _rows: _runtime.Batch | None  # None of buffers that no batch has filled
    _plans: dict[Any, tuple[Mask, Tensor | None]] = field(default_factory=dict)

    @property
    def decodes(self) -> bool:
        """Whether row b holds the one new token of sequence b, so that cu_seqlens_q says nothing more.

        Never of fixed buffers: a CUDA graph that was captured with one batch in them runs others.
        """
        if self._rows is None or self.in_fixed_buffers or self.max_seqlen_q > 1:
            return False
        return self._rows.new_tokens == len(self.seqs) == len(self.seqlens_k) == len(self.positions)

    @property
    def in_fixed_buffers(self) -> bool:
        return self._memory.plans is not None

    @property
    def on_host(self) -> tuple[Tensor, ...]:
        """block_table, seqlens_k, cu_seqlens_q and positions on the CPU."""
        return self._host

    @property
    def new_tokens(self) -> list[int]:
        """How many of each sequence, read on the host."""
        offsets = self._host[2][: len(self.seqs) + 1].tolist()
        return [end - begin for begin, end in pairwise(offsets)]

    def plan(self, mask: Mask, batch_invariant: bool = False) -> Tensor | None:
        """The division of the step's work for `mask`, made once and read by every layer: `paged_attention`'s `plan`.

        Kept for each mask; a prefix tensor is read when its plan is made. A batch in fixed buffers on a GPU
        has its plans there too: the same tensor from step to step for the same mask and kind of prefix. None where the
        C++ library is missing: a call then divides its own work.
        """
        of_each = isinstance(mask.prefix, Tensor)
        key = (id(mask.prefix) if of_each else mask.prefix, *mask[1:], batch_invariant)
        if key not in self._plans:
            block_table, seqlens_k, cu_seqlens_q, _ = self._host
            made = self._divide(block_table, seqlens_k, cu_seqlens_q, mask, batch_invariant)
            if made is not None:
                made = self._memory.keep_plan(("each" if of_each else mask.prefix, *key[1:]), made)
            self._plans[key] = mask, made  # the mask too: its prefix keeps its id
        return self._plans[key][1]

    def plan_over(
        self, block_table: Tensor, seqlens_k: Tensor, cu_seqlens_q: Tensor, mask: Mask, batch_invariant: bool = False
    ) -> Tensor | None:
        """A plan as `plan` makes it, for other keys and queries than the batch's, given on the CPU. Not kept."""
        made = self._divide(block_table, seqlens_k, cu_seqlens_q, mask, batch_invariant)
        return None if made is None else made.to(self.positions.device, non_blocking=True)

    def _divide(
        self, block_table: Tensor, seqlens_k: Tensor, cu_seqlens_q: Tensor, mask: Mask, batch_invariant: bool
    ) -> Tensor | None:
        return plan(
            block_table, seqlens_k, self.page_size, mask, cu_seqlens_q=cu_seqlens_q,
            batch_invariant=batch_invariant, workers=self._memory.workers,
        )  # fmt: skip


@dataclass(frozen=True)
class _Memory:
    """The arrays of a batch in one allocation, so that one copy brings them to a device."""

    batch: int
    max_pages: int
    tokens: int
    page_size: int
    flat: Tensor
    workers: Workers | None
    plans: dict[Any, Tensor] | None  # of fixed buffers

    @classmethod
    def of(
        cls, batch: int, max_pages: int, tokens: int, page_size: int, device: torch.device, workers: Workers | None,
        fixed: bool,
    ) -> _Memory:  # fmt: skip
        size = batch * max_pages + batch + batch + 1 + tokens
        flat = torch.empty(size, dtype=torch.int32, device=device)
        return cls(batch, max_pages, tokens, page_size, flat, workers, {} if fixed else None)

    def parts(self, flat: Any) -> tuple[Any, Any, Any, Any]:
        """block_table, seqlens_k, cu_seqlens_q and positions in `flat`, a tensor or an array."""
        table = self.batch * self.max_pages
        lengths, offsets = table + self.batch, table + 2 * self.batch + 1
        block_table = flat[:table].reshape(self.batch, self.max_pages)
        return block_table, flat[table:lengths], flat[lengths:offsets], flat[offsets:]

    def fill(self, cache: _runtime.Cache, rows: _runtime.Batch) -> tuple[Tensor, ...]:
        """Returns the arrays on the CPU."""
        host = self.flat
        if not host.is_cpu:
            host = torch.empty(self.flat.shape, dtype=torch.int32, pin_memory=self.flat.is_cuda)
        rows.fill(cache, *self.parts(host.numpy()))
        if host is not self.flat:
            self.flat.copy_(host, non_blocking=True)
        return self.parts(host)

    def keep_plan(self, key: Any, made: Tensor) -> Tensor:
        """The plan on the device, with fixed buffers in a tensor that holds any."""
        device = self.flat.device
        if self.plans is None or self.workers is None:
            return made.to(device)
        if key not in self.plans:
            rows = plan_capacity(self.batch, self.tokens, self.max_pages * self.page_size, self.workers)
            self.plans[key] = torch.zeros(rows, 8, dtype=torch.int32, device=device)
        if len(made) > len(self.plans[key]):
            raise RuntimeError(f"a plan of {len(made)} rows in a buffer of {len(self.plans[key])}")
        self.plans[key][: len(made)].copy_(made.pin_memory() if device.type == "cuda" else made, non_blocking=True)
        return self.plans[key]


@dataclass(frozen=True)
class _HostPages:
    """What a swapped-out sequence had committed: as `PagedKVCache._contents`, of its pages alone."""

    parts: list[Tensor]


class PagedKVCache:
    """Keys and values of many sequences, in pages of `page_size` tokens that sequences of equal beginnings share.

    k_pages (num_layers, num_pages, page_size, num_kv_heads, head_dim), v_pages with head_dim_v: in `dtype`, or in the
    dtype that `quantization` ("int8" or "float8_e4m3fn") names, then with k_scales and v_scales, float32
    (num_layers, num_pages, page_size, num_kv_heads), which are None otherwise. `k_pages[layer]` is what
    `paged_attention` and `paged_append` take.

    A page is shared between sequences of equal tokens, equal salt and equal bidirectional prefix, once its content is
    committed; it is copied before one of them writes into it. Every call does all of what it says or raises and
    changes nothing: ValueError or TypeError for arguments, for a sequence that was freed, is swapped out or belongs
    to another cache, and OutOfPages where the pool is too small now. Calls from several threads need a lock.

    The method is that of vLLM (Kwon et al. 2023, arXiv 2309.06180), with a prefix tree as in SGLang (Zheng et al.
    2023, arXiv 2312.07104).
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
    ):
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        _check_size("num_layers", num_layers)
        _check_size("num_pages", num_pages, 2**31 - 1)
        _check_size("page_size", page_size, MAX_PAGE_SIZE)
        _check_size("num_kv_heads", num_kv_heads)
        _check_size("head_dim", head_dim, MAX_HEAD_DIM)
        _check_size("head_dim_v", head_dim_v, MAX_HEAD_DIM)
        if dtype not in _DTYPES:
            wrong_type("dtype", "float32, float16 or bfloat16", dtype)
        if quantization is not None and quantization not in _QUANTIZATIONS:
            wrong_value("quantization", f"None or one of {', '.join(_QUANTIZATIONS)}", quantization)
        self.num_layers, self.num_pages, self.page_size = num_layers, num_pages, page_size
        self.dtype, self.device, self.quantization = dtype, torch.device(device), quantization
        slots = (num_layers, num_pages, page_size, num_kv_heads)
        stored = dtype if quantization is None else _QUANTIZATIONS[quantization]
        self.k_pages = huge_pages.empty(*slots, head_dim, dtype=stored, device=device)
        self.v_pages = huge_pages.empty(*slots, head_dim_v, dtype=stored, device=device)
        self.k_scales = None if quantization is None else torch.empty(slots, dtype=torch.float32, device=device)
        self.v_scales = None if quantization is None else torch.empty(slots, dtype=torch.float32, device=device)
        self._workers = choose_planned(self.k_pages[0, 0]).paged_workers(self.k_pages.device, num_kv_heads)
        self._runtime = _runtime.Cache(num_pages, page_size)
        self._swapped: dict[Sequence, _HostPages] = {}

    def add(
        self, tokens: int | Many[int] | Tensor, bidirectional_prefix: int = 0, salt: str | bytes | None = None
    ) -> Sequence:
        """A new sequence of `tokens`: ids from 0 to 2^31 - 1 as a list, array or tensor, or how many that are unknown.

        Its leading `.cached` tokens were found in the cache and are committed already; the others are to be computed:
        at least the last one, and a bidirectional prefix (of so many tokens) whole where not all of it was found.
        Unknown tokens are never found or shared.
        salt: sequences of other salts share nothing with it. It names a tenant, or what else but the tokens the keys
            depend on, as an adapter or an image do.
        """
        if salt is not None and not isinstance(salt, (str, bytes)):
            wrong_type("salt", "str, bytes or None", type(salt).__name__)
        return self._runtime.add(_on_host(tokens), bidirectional_prefix, salt)

    def extend(self, seq: Sequence, n_or_tokens: int | Many[int] | Tensor) -> None:
        """Adds tokens to be computed, or n slots for tokens that are unknown and so will never be shared."""
        self._runtime.extend(seq, _on_host(n_or_tokens))

    def append(self, seqs: Many[Sequence], tokens: Many[int] | Tensor) -> None:
        """Adds one token to each of the sequences, to all of them or, where it raises, to none."""
        self._runtime.append(seqs, _on_host(tokens))

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence of the same tokens and the same pages. All tokens of `seq` must be committed."""
        return self._runtime.fork(seq)

    def truncate(self, seq: Sequence, n: int) -> None:
        """Keeps the first n tokens: at least the bidirectional prefix, at most all."""
        self._runtime.truncate(seq, n)

    def free(self, seq: Sequence) -> None:
        """Gives the sequence's pages back. What it committed is kept for prompts to come until pages run short."""
        self._runtime.free(seq)
        self._swapped.pop(seq, None)

    def commit(self, seq: Sequence, length: int) -> None:
        """States that the keys and values of the first `length` tokens are written in all layers.

        Full pages of them may be shared from now on. A bidirectional prefix is committed at once.
        """
        self._runtime.commit(seq, length)

    def commit_batch(self, batch: PagedBatch) -> None:
        """States that the batch was computed: commits each sequence to its seqlens_k."""
        if batch._rows is not None:
            self._runtime.commit_batch(batch._rows)

    def batch(
        self, seqs: Many[Sequence], new_tokens: Many[int] | Tensor | None = None, *, out: PagedBatch | None = None
    ) -> PagedBatch:
        """The arrays of a step that computes the next new_tokens[b] uncommitted tokens of each sequence, by default all.

        Makes the copies that forks left to be made, so all writing of keys and values comes after a call of this.
        `out`, from `buffers`, receives the arrays in place of new ones.
        """
        seqs = tuple(seqs)
        if out is not None:
            self._check_buffers(out)
        counts = new_tokens.tolist() if isinstance(new_tokens, Tensor) else new_tokens
        try:
            rows = self._runtime.batch(seqs, counts)
        except TypeError:
            _check_counts(counts)  # the binding names no argument
            raise
        memory = self._memory(len(seqs), rows.max_pages, rows.new_tokens) if out is None else out._memory
        host = memory.fill(self._runtime, rows)
        self._make_pending_copies()
        table, seqlens_k, cu_seqlens_q, positions = memory.parts(memory.flat) if out is None else _tensors(out)
        return PagedBatch(
            table, seqlens_k, cu_seqlens_q, positions, rows.max_seqlen_q, rows.max_seqlen_k, seqs,
            self.page_size, memory, host, rows,
        )  # fmt: skip

    def buffers(self, batch: int, max_pages: int, tokens: int) -> PagedBatch:
        """An empty batch whose tensors later ones are written to: what a CUDA graph was captured with.

        They have room for so many sequences of at most max_pages pages, with so many new tokens together.
        """
        memory = self._memory(batch, max_pages, tokens, fixed=True)
        host = memory.fill(self._runtime, self._runtime.batch([]))
        return PagedBatch(*memory.parts(memory.flat), 0, 0, (), self.page_size, memory, host, None)

    def _check_buffers(self, out: Any) -> None:
        if not isinstance(out, PagedBatch):
            wrong_type("out", "a batch from `buffers`", type(out).__name__)
        if out.page_size != self.page_size:
            wrong_value("out", f"buffers of this cache's page_size ({self.page_size})", out.page_size)
        if out.positions.device != self.k_pages.device:
            wrong_value("out", f"buffers on this cache's device ({self.k_pages.device})", out.positions.device)

    def _memory(self, batch: int, max_pages: int, tokens: int, fixed: bool = False) -> _Memory:
        return _Memory.of(batch, max_pages, tokens, self.page_size, self.device, self._workers, fixed)

    def swap_out(self, seq: Sequence) -> None:
        """Moves what the sequence has committed to host memory and gives its pages back. It can only wait or be freed."""
        self._make_pending_copies()
        pages = self._page_ids(self._runtime.written_pages(seq))
        saved = _HostPages([_to_host(x[:, pages]) for x in self._contents()])
        self._runtime.swap_out(seq)
        self._swapped[seq] = saved

    def swap_in(self, seq: Sequence) -> None:
        """Brings it back as it was. Pages of it that are still in the cache are taken from there."""
        found = self._runtime.swap_in(seq)
        try:
            pages = self._page_ids(self._runtime.written_pages(seq)[found:])
            for x, saved in zip(self._contents(), self._swapped[seq].parts, strict=True):
                x[:, pages] = saved[:, found:].to(self.device)
        except BaseException:
            self._runtime.swap_out(seq)
            raise
        self._runtime.commit(seq, seq.committed)
        del self._swapped[seq]

    @property
    def available_pages(self) -> int:
        """Pages that new tokens can take: free ones, and cached ones that no sequence uses."""
        return self._runtime.available_pages

    def stats(self) -> CacheStats:
        """What the pool holds at this moment, counted anew."""
        counted = self._runtime.stats()
        held = [x for x in (self.k_pages, self.v_pages, self.k_scales, self.v_scales) if x is not None]
        total = sum(x.nbytes for x in held)
        in_sequences = counted.pages_used * self.page_size
        return CacheStats(
            pages_total=counted.pages_total,
            pages_used=counted.pages_used,
            pages_shared=counted.pages_shared,
            pages_cached=counted.pages_cached,
            pages_free=counted.pages_free,
            slots_wasted=counted.slots_wasted,
            waste=counted.slots_wasted / in_sequences if in_sequences else 0.0,
            sequences=counted.sequences,
            swapped=counted.swapped,
            lookup_tokens=counted.lookup_tokens,
            hit_tokens=counted.hit_tokens,
            bytes=total,
            bytes_used=total // self.num_pages * counted.pages_used,
            bytes_swapped=sum(x.nbytes for saved in self._swapped.values() for x in saved.parts),
        )

    def check(self) -> None:
        """Raises RuntimeError, naming every fault, unless the whole bookkeeping is consistent. Costs time; for tests."""
        faults = self._runtime.check()
        if len(self._swapped) != self._runtime.stats().swapped:
            faults.append("the host memory belongs to other sequences than those swapped out")
        if faults:
            raise RuntimeError("the cache is inconsistent: " + "; ".join(faults))

    def _make_pending_copies(self) -> None:
        if self._runtime.has_pending_copies:
            src, dst = (self._page_ids(pages).int() for pages in self._runtime.pending_copies())
            self._copy_pages(src, dst)
            self._runtime.copies_made()

    def _copy_pages(self, src: Tensor, dst: Tensor) -> None:
        """Copies whole pages in all layers."""
        for layer in range(self.num_layers):
            k_scales, v_scales = self.scales(layer)
            copy_pages(self.k_pages[layer], self.v_pages[layer], src, dst, k_scales=k_scales, v_scales=v_scales)

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """k_scales and v_scales of a layer."""
        if self.k_scales is None or self.v_scales is None:
            return None, None
        return self.k_scales[layer], self.v_scales[layer]

    def _contents(self) -> list[Tensor]:
        """Everything that belongs to a page, each (num_layers, num_pages, ...); fp8 as bytes, which every device moves."""
        held = [x for x in (self.k_pages, self.v_pages, self.k_scales, self.v_scales) if x is not None]
        return [x.view(torch.uint8) if x.element_size() == 1 else x for x in held]

    def _page_ids(self, pages: list[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self.device)


def _tensors(batch: PagedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.block_table, batch.seqlens_k, batch.cu_seqlens_q, batch.positions


def _to_host(x: Tensor) -> Tensor:
    return x if x.is_cpu else torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)


def _on_host(tokens: Any) -> Any:
    return tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens


def _check_counts(new_tokens: Any) -> None:
    if new_tokens is None:
        return
    if not isinstance(new_tokens, Many) or isinstance(new_tokens, (str, bytes)):
        wrong_type("new_tokens", "a list of ints", type(new_tokens).__name__)
    for count in new_tokens:
        if not isinstance(count, int):
            wrong_type("new_tokens", "a list of ints", f"one with {type(count).__name__}")


def _check_size(name: str, size: Any, most: int | None = None) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        wrong_type(name, "an int", type(size).__name__)
    if size < 1 or (most is not None and size > most):
        wrong_value(name, "1 or more" if most is None else f"1 to {most}", size)
