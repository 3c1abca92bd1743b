"""A paged cache for transformers' own `generate`.

    cache = PagedCache(model)  # quantization="int8" stores a quarter of float32
    model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

A dynamic cache copies all keys and values to put a token behind them, and to reorder beams. Here a token goes into its slot,
and beams share the pages of what they have in common, as copies of a prompt's cache do (`copy.deepcopy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..cache import Sequence
from ..checks import wrong_type, wrong_value
from ..generate.engine import cache_for
from ..modules.paged_rows import PagedRows
from ..modules.rows import Scores
from .paged_model import PagedModel
from .pages import CacheOfPages, windowed


@dataclass(frozen=True)
class PaddedRows:
    """The new tokens (B, S) of one forward, of which those that are no padding go to the pages."""

    paged: PagedRows
    batch: int
    length: int
    index: Tensor | None  # int64 (T,) in (B * S,), None where none is padding

    def pack(self, x: Tensor) -> Tensor:
        """(B, H, S, D) to (T, H, D)"""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, H, D) to (B, S, H, D), 0 in padding"""
        if self.index is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, (self.batch, self.length))


class PagedCache(CacheOfPages):
    """Keys and values of a batch of texts, in pages, for `generate(..., cache=PagedCache(model))`; `past_key_values` is the
    argument's name before transformers 5.24 (`PagedModel.cache_argument` has it).

    model: as `PagedModel` takes it, or one of these, which is not tried anew; its attention runs here from then on.
    num_pages, page_size: of the pool, by default 1 GiB of the model's dtype in pages of 16 tokens; on a CPU memory counts as used
        when it is first written to.
    quantization: as of `PagedKVCache`.
    Prompts may be padded on the left. As with transformers' caches, texts go on where the cache is passed again, `crop`
    takes tokens back and `reset` all; `copy.deepcopy` shares the pages. Raises OutOfPages where the pool is full, and
    ValueError for other padding than on the left, or than before; it holds what it held then. A model that has lost layers since
    is refused too.
    """

    def __init__(
        self,
        model: PreTrainedModel | PagedModel,
        num_pages: int | None = None,
        page_size: int = 16,
        quantization: str | None = None,
    ):
        model = model if isinstance(model, PagedModel) else PagedModel(model)
        super().__init__(model.places)
        self.model = model
        self._numbers = model.layer_numbers() & self.places.keys()
        self.pool = cache_for(model, num_pages, page_size, quantization=quantization)
        self.seqs: list[Sequence] = []
        self.starts: list[int] = []  # columns of padding before each text
        self.columns = 0  # of padding and tokens that are stored
        self._rows: PaddedRows | None = None  # of the forward that began last
        self._ended = True

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        states = super().update(key_states, value_states, layer_idx)
        if self.places[layer_idx] == 0:
            self._rows = None  # another forward begins
        elif self._ended:
            self._refuse()
        return states

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, scores: Scores, sink: Tensor | None
    ) -> Tensor:
        scores = windowed(scores, mask)
        rows = self._rows
        if rows is None:
            if layer:
                self._refuse()
            rows = self._rows = self._begin(query.shape[0], query.shape[2], mask)
        q, k, v = map(rows.pack, (query, key, value))
        out = rows.paged.attend(layer, q, k, v, scores, sink=sink)
        if layer == self.pool.num_layers - 1 and not self._ended:  # layers after it may attend to its keys once more
            self.pool.commit_batch(rows.paged.batch)
            self.columns += rows.length
            self._ended = True
        return rows.unpack(out)

    def _begin(self, batch: int, length: int, mask: Any) -> PaddedRows:
        """Takes slots for the new tokens of a forward."""
        self._settle()
        columns, prompts = self.columns + length, not self.seqs
        if prompts:
            self._check_layers()
        starts = padding(mask, batch, columns)
        if not prompts and starts != self.starts:
            wrong_value("attention_mask", f"the rows and the padding that the cache has, {self.starts}", starts)
        self._ended = False
        try:
            if prompts:
                self.starts = starts
                for start in starts:
                    self.seqs.append(self.pool.add(length - start))
            else:
                for seq in self.seqs:
                    self.pool.extend(seq, length)
            made = self.pool.batch(self.seqs)
        except BaseException:
            self._rewind()
            raise
        index = None
        if prompts and any(starts):
            tokens = torch.arange(length) >= torch.tensor(starts)[:, None]
            index = tokens.flatten().nonzero()[:, 0].to(self.pool.device)
        return PaddedRows(PagedRows.of(self.pool, made, False), batch, length, index)

    def _settle(self) -> None:
        """Forgets a forward that was interrupted."""
        if not self._ended:
            self._rewind()
            self._check_layers()  # or it ended before the last layer, and would be forgotten each time

    def _check_layers(self) -> None:
        missing = self._numbers - self.model.layer_numbers()
        if missing:
            wrong_value("model", "the layers that it had when its cache was made", f"one without {sorted(missing)}")

    def _refuse(self) -> NoReturn:
        """A layer that no forward over this cache has come to."""
        self._check_layers()
        raise RuntimeError("cache: expected none of its methods in the middle of a forward, got a copy or a change")

    def _rewind(self) -> None:
        """Gives back what a forward took that has not come to its end, and never will."""
        self._rows = None
        if not self.columns:
            self.reset()
        for seq, start in zip(self.seqs, self.starts, strict=True):
            self.pool.truncate(seq, self.columns - start)
        self._ended = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    @property
    def batch_size(self) -> int:
        return len(self.seqs) or -1

    def reset(self) -> None:
        while self.seqs:
            self.pool.free(self.seqs.pop())
        self.starts, self.columns, self._rows, self._ended = [], 0, None, True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -n columns of each text back, at most all; of n > 0, keeps n where transformers' own caches do."""
        self._settle()
        if tokens_to_remove > 0:
            DynamicLayer().crop(tokens_to_remove)  # raises ValueError in newer versions
        keep = tokens_to_remove if tokens_to_remove > 0 else max(self.columns + tokens_to_remove, 0)
        if keep < self.columns:
            self.columns, self.starts = keep, [min(start, keep) for start in self.starts]
            self._rewind()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n goes on from row beam_idx[n]."""
        self._settle()
        rows, free = beam_idx.tolist(), set(self.seqs)
        if not all(0 <= row < len(self.seqs) for row in rows):
            wrong_value("beam_idx", f"rows from 0 to {len(self.seqs) - 1}", rows)
        taken = []
        for row in rows:
            seq = self.seqs[row]
            taken.append(seq if seq in free else self.pool.fork(seq))
            free.discard(seq)
        for seq in free:
            self.pool.free(seq)
        self.seqs, self.starts = taken, [self.starts[row] for row in rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.seqs)).repeat_interleave(repeats))

    def __repr__(self) -> str:
        stats = self.pool.stats()
        pages = f"pages={stats.pages_used} of {stats.pages_total}, page_size={self.pool.page_size}"
        return f"PagedCache(texts={len(self.seqs)}, columns={self.columns}, {pages})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        wrong_type("cache", "its tokens to be pickled, for others may share its pages", "a PagedCache")

    def __deepcopy__(self, memo: Any) -> PagedCache:
        """The same texts, which share their pages with these: what is appended to either is its own."""
        self._settle()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, seqs=[], starts=[*self.starts], _rows=None)
        for seq in self.seqs:
            other.seqs.append(self.pool.fork(seq))
        return other

    def __copy__(self) -> PagedCache:
        return self.__deepcopy__(None)

    def __del__(self) -> None:
        for seq in getattr(self, "seqs", ()):
            self.pool.free(seq)


def padding(mask: Any, batch: int, columns: int) -> list[int]:
    """Columns on the left of each text that a mask hides. Raises ValueError where it hides others."""
    starts, lengths = getattr(mask, "starts_k", None), getattr(mask, "seqlens_k", None)
    found = [0] * batch if starts is None else starts.tolist()
    kept = [columns - start for start in found] if lengths is None else lengths.tolist()
    if [start + length for start, length in zip(found, kept, strict=True)] != [columns] * batch:
        wrong_value("attention_mask", "padding on the left alone", f"rows of {kept} tokens in {columns} columns")
    return found
