"""Keys and values that are known: each depends on its token and position, as random as any and made again at will."""

from __future__ import annotations

import duplex_attn as da
import torch
from duplex_attn.cache import PagedBatch, Sequence
from torch import Tensor


def keys(tokens: list[int], like: Tensor, seed: int = 0) -> Tensor:
    """(num_layers, tokens, *rest) for contents `like` (num_layers, num_pages, page_size, *rest), in its dtype."""
    layers, _, _, *rest = like.shape
    made = torch.empty(layers, len(tokens), *rest, dtype=torch.float32)
    for n, token in enumerate(tokens):
        g = torch.Generator().manual_seed(seed + 1000 * n + token)
        made[:, n] = torch.randint(-8, 8, (layers, *rest), generator=g)  # exact in every dtype
    return made.to(like.dtype)


def compute(cache: da.PagedKVCache, seqs: list[Sequence], new_tokens: list[int] | None = None) -> PagedBatch:
    """A step as a model makes it: writes the new tokens of the batch through its arrays, then commits."""
    batch = cache.batch(seqs, new_tokens)
    for b, seq in enumerate(seqs):
        start, end = batch.cu_seqlens_q[b : b + 2].tolist()
        positions = batch.positions[start:end].long()
        slots = positions % cache.page_size
        pages = batch.block_table[b].long()[positions // cache.page_size]
        for seed, held in enumerate(held_by(cache)):
            held[:, pages, slots] = keys(seq.tokens, held, seed)[:, positions]
    cache.commit_batch(batch)
    return batch


def assert_reads_what_was_written(cache: da.PagedKVCache, *seqs: Sequence) -> None:
    batch = cache.batch(seqs, [0] * len(seqs))  # computes nothing, and makes the pending copies
    for b, seq in enumerate(seqs):
        for seed, held in enumerate(held_by(cache)):
            read = held[:, batch.block_table[b].long()].flatten(1, 2)[:, : batch.seqlens_k[b]]
            assert torch.equal(read.float(), keys(seq.tokens[: seq.committed], held, seed).float())


def held_by(cache: da.PagedKVCache) -> list[Tensor]:
    return [x for x in (cache.k_pages, cache.v_pages, cache.k_scales, cache.v_scales) if x is not None]
