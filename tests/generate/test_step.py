"""`GPT.step`: one step over a paged cache is the model over whole sequences."""

from __future__ import annotations

import random

import duplex_attn as da
import pytest
import torch
from duplex_attn.cache import Sequence
from duplex_attn.modules import GPT
from duplex_attn.modules.paged_rows import PagedRows
from torch import Tensor

EXACT = {"atol": 2e-5, "rtol": 2e-5}
LINES = [random.Random(n).choices(range(300), k=length) for n, length in enumerate((23, 1, 40, 9))]


def cache_for(model: GPT, **options: object) -> da.PagedKVCache:
    config = model.config
    return da.PagedKVCache(config.layers, 64, 4, config.heads_kv, config.head_dim, **options)


def step(
    model: GPT, cache: da.PagedKVCache, seqs: list[Sequence], counts: list[int], every: bool = False, **options: bool
) -> Tensor:
    new = [seq.tokens[seq.committed :][:count] for seq, count in zip(seqs, counts, strict=True)]
    ids = torch.tensor([token for tokens in new for token in tokens])
    batch = cache.batch(seqs, counts)
    logits = model.step(ids, cache, batch, torch.arange(len(ids)) if every else None, **options)
    cache.commit_batch(batch)
    return logits


@pytest.mark.parametrize("prefix", [0, 5])
def test_whole_prompts_at_once(model: GPT, prefix: int) -> None:
    cache = cache_for(model)
    prefixes = [min(prefix, len(line)) for line in LINES]
    seqs = [cache.add(line, count) for line, count in zip(LINES, prefixes, strict=True)]
    logits = step(model, cache, seqs, [len(line) for line in LINES], every=True)
    expected = [model(torch.tensor([line]), mask=da.prefix_lm(n))[0] for line, n in zip(LINES, prefixes, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected), **EXACT)


def test_chunks_and_decoding_in_one_batch(model: GPT) -> None:
    """One sequence encodes (a bidirectional prefix of all of it), one continues a prompt, one decodes."""
    cache = cache_for(model)
    encoding, chunked, decoding = cache.add(LINES[3], 9), cache.add(LINES[2]), cache.add(LINES[0])
    step(model, cache, [chunked, decoding], [11, 22])
    logits = step(model, cache, [encoding, chunked, decoding], [9, 13, 1])
    whole = [(LINES[3], da.prefix_lm(9)), (LINES[2][:24], da.causal()), (LINES[0], da.causal())]
    expected = [model(torch.tensor([line]), mask=mask)[0, -1] for line, mask in whole]
    torch.testing.assert_close(logits, torch.stack(expected), **EXACT)


def test_decoding_after_truncation_and_fork(model: GPT) -> None:
    cache = cache_for(model)
    seq = cache.add(LINES[0])
    step(model, cache, [seq], [23])
    fork = cache.fork(seq)
    cache.truncate(seq, 10)
    cache.extend(seq, [5])
    cache.extend(fork, [6])
    logits = step(model, cache, [seq, fork], [1, 1])
    for row, line in zip(logits, ([*LINES[0][:10], 5], [*LINES[0], 6]), strict=True):
        torch.testing.assert_close(row, model(torch.tensor([line]))[0, -1], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 5])
def test_batch_invariant_logits(model: GPT, dtype: torch.dtype, threads: int) -> None:
    """No bit depends on the batch, the chunks, the pages, or whether tokens came one by one."""
    torch.set_num_threads(threads)
    model = GPT(model.config).eval().to(dtype) if dtype != torch.float32 else model
    alone = []
    for line in LINES:
        cache = cache_for(model, dtype=dtype)
        seq = cache.add(line)
        alone.append(step(model, cache, [seq], [len(line)], every=True, batch_invariant=True))
    cache = cache_for(model, dtype=dtype)
    seqs = [cache.add(line) for line in reversed(LINES)]
    found: dict[Sequence, list[Tensor]] = {seq: [] for seq in seqs}
    rng = random.Random(1)
    while left := [seq for seq in seqs if seq.committed < seq.length]:
        counts = [min(rng.choice((1, 1, 2, 7)), seq.length - seq.committed) for seq in left]
        rows = step(model, cache, left, counts, every=True, batch_invariant=True).split(counts)
        for seq, part in zip(left, rows, strict=True):
            found[seq].append(part)
    for expected, seq in zip(reversed(alone), seqs, strict=True):
        assert torch.cat(found[seq]).equal(expected)


@pytest.mark.parametrize("quantization", ["int8", "float8_e4m3fn"])
def test_a_quantised_cache(model: GPT, quantization: str) -> None:
    cache = cache_for(model, quantization=quantization)
    seqs = [cache.add(line) for line in LINES]
    logits = step(model, cache, seqs, [len(line) for line in LINES])
    expected = torch.stack([model(torch.tensor([line]))[0, -1] for line in LINES])
    assert 0 < (logits - expected).abs().max() < 0.2 * expected.abs().max()


def test_buffers_larger_than_the_batch(model: GPT) -> None:
    cache = cache_for(model)
    seqs = [cache.add(line) for line in LINES[:2]]
    batch = cache.batch(seqs, out=cache.buffers(3, 16, 30))
    ids = torch.tensor([*LINES[0], *LINES[1], *[0] * 6])
    logits = model.step(ids, cache, batch)
    for row, line in zip(logits, LINES[:2], strict=False):
        torch.testing.assert_close(row, model(torch.tensor([line]))[0, -1], **EXACT)


def test_decoding_in_buffers_larger_than_the_batch(model: GPT) -> None:
    cache = cache_for(model)
    seqs = [cache.add(line) for line in LINES[:2]]
    step(model, cache, seqs, [23, 1])
    cache.append(seqs, [7, 8])
    batch = cache.batch(seqs, out=cache.buffers(4, 16, 4))
    logits = model.step(torch.tensor([7, 8, 0, 0]), cache, batch)
    for row, line in zip(logits, ([*LINES[0], 7], [*LINES[1], 8]), strict=False):
        torch.testing.assert_close(row, model(torch.tensor([line]))[0, -1], **EXACT)


@pytest.mark.parametrize("fixed", [True, False])
def test_one_that_waits_among_those_that_decode(model: GPT, fixed: bool) -> None:
    """A token for one of two sequences, in buffers with room for one of each: nothing goes into the other's pages."""
    cache = cache_for(model)
    waits, decodes = seqs = [cache.add(line) for line in (LINES[0], LINES[3])]
    step(model, cache, seqs, [23, 9])
    cache.append(seqs, [7, 8])
    before = cache.k_pages[:, waits.pages].clone()
    batch = cache.batch(seqs, [0, 1], out=cache.buffers(2, 16, 2) if fixed else cache.batch(seqs))
    logits = model.step(torch.tensor([8, 0]), cache, batch, torch.tensor([0]))
    cache.commit_batch(batch)
    torch.testing.assert_close(logits[0], model(torch.tensor([[*LINES[3], 8]]))[0, -1], **EXACT)
    assert (waits.committed, decodes.committed) == (23, 10)
    assert cache.k_pages[:, waits.pages].view(torch.int32).equal(before.view(torch.int32))  # of bits, some being NaN
    logits = step(model, cache, [waits], [1])
    torch.testing.assert_close(logits[0], model(torch.tensor([[*LINES[0], 7]]))[0, -1], **EXACT)


def test_what_a_graph_is_captured_with_serves_any_batch(model: GPT) -> None:
    """In fixed buffers the offsets are read even where each row is a sequence's: a replay may have another batch there."""
    cache = cache_for(model)
    seqs = [cache.add([5]), cache.add([6])]
    buffers = cache.buffers(2, 4, 2)
    assert PagedRows.of(cache, cache.batch(seqs, out=buffers), False).cu_seqlens is buffers.cu_seqlens_q
    assert PagedRows.of(cache, cache.batch(seqs), False).cu_seqlens is None
    assert PagedRows.of(cache, cache.batch(seqs, [0, 1]), False).cu_seqlens is not None
    assert model.step(torch.tensor([0, 0]), cache, cache.buffers(2, 4, 2)).shape == (2, model.config.vocab_size)


def test_bad_input(model: GPT) -> None:
    cache = cache_for(model)
    batch = cache.batch([cache.add([1, 2, 3])])
    with pytest.raises(ValueError, match=r"ids: expected the batch's 3 new tokens, got \(2,\)"):
        model.step(torch.tensor([1, 2]), cache, batch)
    seqs = [cache.add([1, 2]), cache.add([3, 4])]
    for counts, out in (([1, 0], None), ([0, 2], None), ([1, 0], cache.buffers(3, 4, 1))):
        batch = cache.batch(seqs, counts, out=out)
        ids = torch.zeros(sum(counts), dtype=torch.int64)
        with pytest.raises(
            ValueError, match="rows: expected the rows wanted, where a sequence has no new token, got None"
        ):
            model.step(ids, cache, batch)
        assert model.step(ids, cache, batch, torch.tensor([0])).shape == (1, 300)
    batch = cache.batch([cache.add(list(range(90)) + list(range(39)))])
    with pytest.raises(ValueError, match=r"ids: expected at most max_positions \(128\) tokens, got 129"):
        model.step(torch.zeros(129, dtype=torch.int64), cache, batch)
