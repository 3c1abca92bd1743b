"""Wrong calls say what is wrong and change nothing; an exception in the middle leaves the cache consistent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duplex_attn as da
import numpy as np
import pytest
import torch
from duplex_attn import _runtime

Use = Callable[[da.PagedKVCache, Any], object]
USES: dict[str, Use] = {
    "extend": lambda cache, seq: cache.extend(seq, 1),
    "append": lambda cache, seq: cache.append([seq], [1]),
    "fork": lambda cache, seq: cache.fork(seq),
    "truncate": lambda cache, seq: cache.truncate(seq, 0),
    "commit": lambda cache, seq: cache.commit(seq, 1),
    "batch": lambda cache, seq: cache.batch([seq]),
    "swap_out": lambda cache, seq: cache.swap_out(seq),
}


def snapshot(cache: da.PagedKVCache, *seqs: Any) -> Any:
    return cache.stats(), [(s.tokens, s.pages, s.committed, s.cached) for s in seqs]


@pytest.mark.parametrize("use", [*USES, "swap_in", "free", "length", "tokens", "pages"])
def test_use_after_free(cache: da.PagedKVCache, use: str) -> None:
    seq = cache.add([1, 2])
    cache.commit(seq, 2)
    cache.free(seq)
    assert seq.freed and repr(seq) == "<Sequence, freed>"
    others = [cache.add([3, 4])]  # has the page now
    before = snapshot(cache, *others)
    calls = {**USES, "swap_in": da.PagedKVCache.swap_in, "free": da.PagedKVCache.free}
    with pytest.raises(ValueError, match="seq: expected a live sequence, got one that was freed"):
        calls[use](cache, seq) if use in calls else getattr(seq, use)
    assert snapshot(cache, *others) == before


@pytest.mark.parametrize("use", USES)
def test_use_while_swapped_out(cache: da.PagedKVCache, use: str) -> None:
    seq = cache.add([1, 2])
    cache.commit(seq, 2)
    cache.swap_out(seq)
    with pytest.raises(ValueError, match="expected a sequence in the pool, got one that is swapped out"):
        USES[use](cache, seq)
    cache.free(seq)
    assert cache.stats().bytes_swapped == 0


@pytest.mark.parametrize("use", [*USES, "free"])
def test_a_sequence_of_another_cache(cache: da.PagedKVCache, use: str) -> None:
    other = da.PagedKVCache(1, 4, 4, 1, 1)
    seq = other.add([1, 2])
    other.commit(seq, 2)
    with pytest.raises(ValueError, match="expected a sequence of this cache, got one of another"):
        {**USES, "free": da.PagedKVCache.free}[use](cache, seq)
    other.check()


def test_a_sequence_that_is_none(cache: da.PagedKVCache) -> None:
    for use in USES.values():
        with pytest.raises(TypeError):
            use(cache, None)


def test_swap_in_of_what_is_here(cache: da.PagedKVCache) -> None:
    with pytest.raises(ValueError, match="expected a sequence that is swapped out"):
        cache.swap_in(cache.add([1]))


def test_truncation_past_either_end(cache: da.PagedKVCache) -> None:
    seq = cache.add([1, 2, 3])
    for n in (-1, 4):
        with pytest.raises(ValueError, match=rf"n: expected 0 to the sequence's length \(3\), got {n}"):
            cache.truncate(seq, n)
    assert seq.length == 3


def test_a_fork_of_what_is_not_written(cache: da.PagedKVCache) -> None:
    seq = cache.add([1, 2, 3])
    cache.commit(seq, 2)
    with pytest.raises(ValueError, match="whose 3 tokens are all committed before it is forked, got 2 of them"):
        cache.fork(seq)


def test_commits_past_the_end_or_of_half_a_prefix(cache: da.PagedKVCache) -> None:
    seq = cache.add(list(range(6)), bidirectional_prefix=5)
    for length in (-1, 7):
        with pytest.raises(ValueError, match=f"length: expected 0 to 6 tokens, got {length}"):
            cache.commit(seq, length)
    with pytest.raises(ValueError, match=r"length: expected the whole bidirectional prefix \(5\) at once, got 4"):
        cache.commit(seq, 4)
    with pytest.raises(ValueError, match=r"new_tokens: expected the whole bidirectional prefix \(5\) at once, got 4"):
        cache.batch([seq], [4])
    assert seq.committed == 0
    assert cache.batch([seq], [0]).seqlens_k.tolist() == [0]


def test_batches_that_would_write_twice_or_past_the_end(cache: da.PagedKVCache) -> None:
    seq, other = cache.add([1, 2, 3]), cache.add([4])
    with pytest.raises(ValueError, match="seqs: expected each sequence once, got one twice"):
        cache.batch([seq, other, seq])
    with pytest.raises(ValueError, match="seqs: expected each sequence once, got one twice"):
        cache.append([seq, other, seq], [1, 2, 3])
    for n in (-1, 4):
        with pytest.raises(ValueError, match=f"new_tokens: expected 0 to the 3 tokens not yet committed, got {n}"):
            cache.batch([seq], [n])
    with pytest.raises(ValueError, match="new_tokens: expected one for each of 2 sequences, got 1"):
        cache.batch([seq, other], [1])
    with pytest.raises(ValueError, match="tokens: expected one for each of 2 sequences, got 1"):
        cache.append([seq, other], [1])
    assert (seq.length, other.length) == (3, 1)


def test_counts_are_ints_in_a_list_array_or_tensor(cache: da.PagedKVCache) -> None:
    seq = cache.add([1, 2, 3])
    for counts in ([2], (2,), torch.tensor([2]), torch.tensor([2]).numpy()):
        assert cache.batch([seq], counts).positions.tolist() == [0, 1]
    for wrong, got in (([1.5], "one with float"), ([None], "one with NoneType"), ("2", "str"), (2, "int")):
        with pytest.raises(TypeError, match=f"new_tokens: expected a list of ints, got {got}"):
            cache.batch([seq], wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="new_tokens: expected a list of ints, got one with float"):
        cache.batch([seq], torch.tensor([2.0]))


def test_buffers_of_another_cache(cache: da.PagedKVCache) -> None:
    other = da.PagedKVCache(2, 12, 8, 2, 8)
    seq = cache.add([1, 2, 3])
    with pytest.raises(ValueError, match=r"out: expected buffers of this cache's page_size \(4\), got 8"):
        cache.batch([seq], out=other.buffers(1, 4, 8))
    with pytest.raises(TypeError, match="out: expected a batch from `buffers`, got int"):
        cache.batch([seq], out=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([1, -1], ValueError, "tokens: expected ids from 0 to 2147483647, got -1"),
        ([1, 2**31], ValueError, "got 2147483648"),
        ([1, 2**70], ValueError, "tokens: expected ids"),
        (-1, ValueError, "expected 0 or more"),
        (2**70, (ValueError, da.OutOfPages), "expected"),
        ([1, "a"], TypeError, "str"),
        ([1, 2.5], TypeError, "float"),
        ("ab", TypeError, "tokens: expected a list, array or tensor of ints, got str"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(3), TypeError, "tokens: expected integers, got float32"),
        (torch.zeros(3, 2, dtype=torch.int32), ValueError, "tokens: expected one dimension, got 2"),
    ],
)
def test_tokens_that_are_none(cache: da.PagedKVCache, tokens: Any, error: Any, message: str) -> None:
    seq = cache.add([1, 2])
    before = snapshot(cache, seq)
    with pytest.raises(error, match=message):
        cache.add(tokens)
    with pytest.raises(error, match=message):
        cache.extend(seq, tokens)
    assert snapshot(cache, seq) == before


def test_a_list_that_changes_while_it_is_read(cache: da.PagedKVCache) -> None:
    class Shrinks:
        def __index__(self) -> int:
            tokens.clear()
            return 1

    tokens: list[Any] = [Shrinks(), 2, 3]
    with pytest.raises(ValueError, match="changes while it is read"):
        cache.add(tokens)
    assert cache.stats().sequences == 0


def test_an_element_that_leaves_its_list_while_it_is_read(cache: da.PagedKVCache) -> None:
    """It is named all the same, not what lies in its memory by then."""

    class Leaves:
        __slots__ = ()

        def __index__(self) -> int:
            tokens[0] = 0
            del self
            others.extend(Other() for _ in range(100))
            raise TypeError

    class Other:
        __slots__ = ()

    others: list[Other] = []
    tokens: list[Any] = [Leaves()]
    with pytest.raises(TypeError, match="tokens: expected integers, got Leaves"):
        cache.add(tokens)


@pytest.mark.parametrize("change", ["free", "truncate", "swap_out"])
def test_a_batch_whose_sequence_has_lost_pages_is_not_filled(cache: da.PagedKVCache, change: str) -> None:
    seq = cache.add([1, 2, 3, 4, 5])
    cache.commit(seq, 3)
    batch = cache._runtime.batch([seq])
    getattr(cache, change)(seq, *[2] * (change == "truncate"))
    arrays = [np.full(shape, 7, dtype=np.int32) for shape in ((1, 2), (1,), (2,), (2,))]
    with pytest.raises(ValueError, match="batch: expected sequences as they were when it was made"):
        batch.fill(cache._runtime, *arrays)
    assert all((x == 7).all() for x in arrays)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_freed_sequence_keeps_no_memory() -> None:
    """4 MB of tokens each, of handles that are kept."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    cache = _runtime.Cache(4096, 256)
    before = resident()
    seqs = []
    for _ in range(50):
        seqs.append(cache.add(10**6))
        cache.free(seqs[-1])
    assert resident() - before < 50e6


def test_a_bidirectional_prefix_longer_than_the_prompt(cache: da.PagedKVCache) -> None:
    for prefix in (-1, 3):
        with pytest.raises(ValueError, match=f"bidirectional_prefix: expected 0 to 2 tokens, got {prefix}"):
            cache.add([1, 2], prefix)


class TestOutOfPages:
    """12 pages of 4: a prompt of 30 tokens leaves 4."""

    @pytest.fixture
    def seqs(self, cache: da.PagedKVCache) -> list[Any]:
        long = cache.add(list(range(30)))
        cache.commit(long, 30)
        return [long, cache.fork(long), cache.add([7] * 12)]

    def refused(self, cache: da.PagedKVCache, seqs: list[Any], call: Callable[[], object], pages: str) -> None:
        before = snapshot(cache, *seqs)
        with pytest.raises(da.OutOfPages, match=f"expected {pages} of 12 are available"):
            call()
        assert snapshot(cache, *seqs) == before
        assert not cache._runtime.has_pending_copies
        cache.check()

    def test_add(self, cache: da.PagedKVCache, seqs: list[Any]) -> None:
        self.refused(cache, seqs, lambda: cache.add([1] * 5), "2 pages, 1")
        self.refused(cache, seqs, lambda: cache.add([1] * 5, 5, "salt"), "2 pages, 1")
        self.refused(cache, seqs, lambda: cache.add(list(range(28)) + [9] * 5), "2 pages, 1")  # 28 are found
        self.refused(cache, seqs, lambda: cache.add(10**9), "250000000 pages, 1")

    def test_extend_counts_the_copy(self, cache: da.PagedKVCache, seqs: list[Any]) -> None:
        self.refused(cache, seqs, lambda: cache.extend(seqs[0], [1, 2, 3]), "2 pages, 1")
        cache.extend(seqs[0], [1, 2])

    def test_append_is_for_all_or_none(self, cache: da.PagedKVCache, seqs: list[Any]) -> None:
        self.refused(cache, seqs, lambda: cache.append([*seqs], [1, 2, 3]), "2 pages, 1")
        cache.append(seqs[:2], [1, 2])  # one copy serves both

    def test_found_pages_are_not_counted_as_available(self, cache: da.PagedKVCache, seqs: list[Any]) -> None:
        cache.free(seqs[0])
        cache.free(seqs[1])  # 7 pages are kept now
        seqs = seqs[2:]
        assert cache.available_pages == 9
        self.refused(cache, seqs, lambda: cache.add([*range(28), *[9] * 9]), "3 pages, 2")
        kept = cache.add([*range(28), *[9] * 8])
        assert kept.cached == 28 and cache.available_pages == 0

    def test_swap_in(self, cache: da.PagedKVCache, seqs: list[Any]) -> None:
        cache.commit(seqs[2], 12)
        cache.swap_out(seqs[2])
        cache.add([1] * 14)
        seqs = [seqs[0], seqs[1], seqs[2]]
        self.refused(cache, seqs, lambda: cache.swap_in(seqs[2]), "3 pages, 0")


class TestExceptionsInTheMiddle:
    @pytest.fixture
    def forks(self, cache: da.PagedKVCache) -> list[Any]:
        seq = cache.add(list(range(6)))
        cache.commit(seq, 6)
        return [seq, cache.fork(seq)]

    def fail(self, *_: object) -> None:
        raise KeyboardInterrupt

    def test_while_pages_are_copied(
        self, cache: da.PagedKVCache, forks: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.extend(forks[1], [9])
        monkeypatch.setattr(cache, "_copy_pages", self.fail)
        for call in (lambda: cache.batch(forks), lambda: cache.swap_out(forks[0])):
            with pytest.raises(KeyboardInterrupt):
                call()
            cache.check()
            assert cache._runtime.has_pending_copies  # they will be made by the next
        monkeypatch.undo()
        cache.batch(forks)
        assert not cache._runtime.has_pending_copies

    def test_while_a_sequence_is_swapped(
        self, cache: da.PagedKVCache, forks: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("duplex_attn.cache._to_host", self.fail)
        with pytest.raises(KeyboardInterrupt):
            cache.swap_out(forks[0])
        assert not forks[0].swapped
        monkeypatch.undo()
        cache.extend(forks[1], [9])  # a copy is pending while the other comes back
        cache.swap_out(forks[0])
        monkeypatch.setattr(cache, "_contents", self.fail)
        with pytest.raises(KeyboardInterrupt):
            cache.swap_in(forks[0])
        assert forks[0].swapped
        cache.check()
        monkeypatch.undo()
        cache.swap_in(forks[0])
        assert forks[0].committed == 6 and not forks[0].swapped

    def test_a_batch_of_which_one_was_freed_commits_none(self, cache: da.PagedKVCache) -> None:
        seqs = [cache.add([n] * 5) for n in range(3)]
        batch = cache.batch(seqs)
        cache.free(seqs[1])
        with pytest.raises(ValueError, match="one that was freed"):
            cache.commit_batch(batch)
        assert seqs[0].committed == seqs[2].committed == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_pages": 0}, ValueError, "num_pages: expected 1 to 2147483647, got 0"),
        ({"num_layers": -1}, ValueError, "num_layers: expected 1 or more, got -1"),
        ({"page_size": 257}, ValueError, "page_size: expected 1 to 256, got 257"),
        ({"head_dim": 257}, ValueError, "head_dim: expected 1 to 256, got 257"),
        ({"head_dim_v": 0}, ValueError, "head_dim_v: expected 1 to 256, got 0"),
        ({"num_kv_heads": 2.0}, TypeError, "num_kv_heads: expected an int, got float"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"quantization": "int4"}, ValueError, "quantization: expected None or one of int8, float8_e4m3fn, got int4"),
    ],
)
def test_wrong_sizes(change: dict[str, Any], error: Any, message: str) -> None:
    sizes = {"num_layers": 1, "num_pages": 4, "page_size": 4, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(error, match=message):
        da.PagedKVCache(**{**sizes, **change})


def test_without_the_native_runtime_the_package_imports_and_the_cache_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['duplex_attn._runtime'] = None\n"
        "import duplex_attn\n"
        "try: duplex_attn.PagedKVCache\n"
        "except ImportError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install a C++ compiler" in ran.stdout


def test_importing_the_package_does_not_load_the_cache() -> None:
    code = "import sys, duplex_attn; print('duplex_attn.cache' in sys.modules, 'duplex_attn._runtime' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
