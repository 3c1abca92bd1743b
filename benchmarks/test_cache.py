"""What a paged cache costs on the host, and the slots it wastes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import duplex_attn as da
import pytest
from duplex_attn.cache import Sequence
from duplex_attn.profile.timing import Spread

from .bar import OURS, Bar, Bench, at_most

MICRO = 1e6
PAGE_SIZE = 16
PROMPT = 8192  # tokens
ROUNDS, TRIAL = 300, 2


def cache_of(bench: Bench, num_pages: int) -> da.PagedKVCache:
    """The bookkeeping knows nothing of the size of keys and values."""
    return da.PagedKVCache(1, num_pages, PAGE_SIZE, 1, 1, device=bench.device)


def mixed_load(cache: da.PagedKVCache, count: int, rng: random.Random) -> list[Sequence]:
    """Sequences of 64 to 2048 tokens, all committed."""
    seqs = []
    for _ in range(count):
        seq = cache.add([rng.randrange(50000) for _ in range(rng.randint(64, 2048))])
        cache.commit(seq, seq.length)
        seqs.append(seq)
    return seqs


def keep(
    bench: Bench, name: str, limit: float, call: Callable[[], Any], undo: Callable[[Any], None], **facts: Any
) -> None:
    """The bar of one call in microseconds; `undo`, which is not timed, takes what it returned."""
    found: list[float] = []

    def once() -> None:
        start = time.perf_counter()
        made = call()
        found.append(time.perf_counter() - start)
        undo(made)

    bench.benchmark.pedantic(once, rounds=TRIAL if bench.tiny else ROUNDS, warmup_rounds=3)
    seconds = found[3:]
    measured = Spread.of([value * MICRO for value in seconds])
    bench.keep(Bar("cache", name, at_most(limit, "us"), measured, {OURS: Spread.of(seconds)}, facts=facts))


def test_fork(bench: Bench) -> None:
    cache = cache_of(bench, 1024)
    seq = cache.add(list(range(PROMPT)))
    cache.commit(seq, PROMPT)
    fork = cache.fork(seq)
    assert fork.tokens == seq.tokens and fork.pages == seq.pages
    keep(bench, "fork of 8k tokens", 20, lambda: cache.fork(seq), cache.free)
    cache.check()


def test_append_and_batch(bench: Bench) -> None:
    """One token more for each of 256 sequences, and the arrays that the step's kernels read."""
    cache = cache_of(bench, 40_000)
    seqs = mixed_load(cache, 8 if bench.tiny else 256, random.Random(0))
    tokens = [7] * len(seqs)

    def step() -> Any:
        cache.append(seqs, tokens)
        return cache.batch(seqs)

    batch = step()
    assert batch.positions.tolist() == [seq.length - 1 for seq in seqs]
    cache.commit_batch(batch)
    keep(bench, "append and batch, 256 sequences", 50, step, cache.commit_batch)
    cache.check()


@pytest.mark.parametrize("given", ["list", "array"])
def test_prefix_lookup(bench: Bench, given: str) -> None:
    """All of `add` of a prompt that is in the cache, among as much again that is not asked for."""
    rng = random.Random(0)
    cache = cache_of(bench, 2048)
    prompts = [[rng.randrange(50000) for _ in range(PROMPT)] for _ in range(2)]
    for prompt in prompts:
        cache.commit(cache.add(prompt), PROMPT)
    tokens: Any = prompts[0]
    if given == "array":
        numpy = pytest.importorskip("numpy")
        tokens = numpy.array(tokens, dtype=numpy.int32)
    seq = cache.add(tokens)
    assert seq.cached == PROMPT - PAGE_SIZE and seq.tokens == prompts[0]
    keep(bench, f"prefix lookup of 8k tokens, {given}", 100, lambda: cache.add(tokens), cache.free)
    cache.check()


def test_waste(bench: Bench) -> None:
    """Slots allocated and unused while sequences come, grow and go, in per cent of those allocated."""
    rng = random.Random(0)
    cache = cache_of(bench, 40_000)
    live = mixed_load(cache, 8 if bench.tiny else 128, rng)
    found: list[float] = []

    def churn() -> None:
        cache.free(live.pop(rng.randrange(len(live))))
        live.extend(mixed_load(cache, 1, rng))
        for _ in range(8):
            cache.append(live, [rng.randrange(50000) for _ in live])
            cache.commit_batch(cache.batch(live))
        found.append(100 * cache.stats().waste)

    bench.benchmark.pedantic(churn, rounds=TRIAL if bench.tiny else 60)
    cache.check()
    bench.keep(Bar("cache", "waste, pages of 16", at_most(4, "%"), Spread.of(found), {}))
