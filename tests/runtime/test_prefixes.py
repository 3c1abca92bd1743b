"""What is shared between prompts: full, committed pages of equal tokens, salt and direction, and nothing else."""

from __future__ import annotations

import duplex_attn as da
import pytest
from duplex_attn import _runtime
from duplex_attn.cache import Sequence

PROMPT = list(range(100, 111))  # 2 full pages of 4, and 3 tokens


def committed(cache: da.PagedKVCache, tokens: list[int], prefix: int = 0, salt: str | None = None) -> Sequence:
    seq = cache.add(tokens, prefix, salt)
    cache.commit(seq, seq.length)
    return seq


def cached(cache: da.PagedKVCache, tokens: list[int], prefix: int = 0, salt: str | bytes | None = None) -> int:
    seq = cache.add(tokens, prefix, salt)
    found = seq.cached
    assert seq.committed == found
    cache.free(seq)
    return found


def test_nothing_is_shared_before_it_is_committed(cache: da.PagedKVCache) -> None:
    seq = cache.add(PROMPT)
    for length, found in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (11, 8)):
        cache.commit(seq, length)
        assert cached(cache, PROMPT) == found


def test_pages_are_shared_between_living_sequences(cache: da.PagedKVCache) -> None:
    first = committed(cache, PROMPT)
    second = cache.add(PROMPT)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert cache.stats().pages_shared == 2 and cache.stats().pages_used == 4


def test_the_last_token_is_always_left_to_compute(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT)
    assert cached(cache, PROMPT[:8]) == 4
    assert cached(cache, PROMPT[:9]) == 8
    assert cached(cache, PROMPT[:1]) == 0
    assert cached(cache, []) == 0


def test_a_page_is_found_only_after_what_came_before_it(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT)
    assert cached(cache, [*PROMPT[:3], 0, *PROMPT[4:]]) == 0
    assert cached(cache, [*PROMPT[:7], 0, *PROMPT[8:]]) == 4
    assert cached(cache, PROMPT[4:]) == 0


def test_decoded_tokens_are_found_too(cache: da.PagedKVCache) -> None:
    seq = committed(cache, PROMPT)
    cache.extend(seq, [1])
    cache.commit(seq, 12)
    cache.free(seq)
    assert cached(cache, [*PROMPT, 1, 2]) == 12


def test_salts_keep_tenants_apart(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT, salt="a")
    assert cached(cache, PROMPT, salt="b") == cached(cache, PROMPT) == cached(cache, PROMPT, salt="") == 0
    assert cached(cache, PROMPT, salt="a") == cached(cache, PROMPT, salt=b"a") == 8


def test_directions_are_kept_apart(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT, prefix=6)
    assert cached(cache, PROMPT) == cached(cache, PROMPT, prefix=5) == cached(cache, PROMPT, prefix=7) == 0
    assert cached(cache, PROMPT, prefix=6) == 8


def test_a_page_inside_a_bidirectional_prefix_is_keyed_by_all_of_it(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT, prefix=8)
    assert cached(cache, [*PROMPT[:7], 0, *PROMPT[8:]], prefix=8) == 0  # the first page has equal tokens
    assert cached(cache, [*PROMPT[:8], 0], prefix=8) == 8


def test_a_bidirectional_prefix_is_found_whole_or_not_at_all(cache: da.PagedKVCache) -> None:
    first = cache.add(PROMPT[:10], 8)
    cache.commit(first, 8)
    cache.free(first)
    held = [cache.add([n] * 4) for n in range(11)]  # all but the first of its two pages
    for seq in held:
        cache.free(seq)
    assert cache.stats().pages_cached == 1
    assert cached(cache, PROMPT[:10], prefix=8) == 0
    assert cached(cache, PROMPT[:8], prefix=8) == 0


def test_a_collision_of_hashes_shares_nothing() -> None:
    cache = da.PagedKVCache(1, 128, 4, 1, 1)
    cache._runtime = _runtime.Cache(128, 4, hash_bits=0)  # all hashes are 0
    prompts = [[n, *PROMPT[1:]] for n in range(8)]
    for prompt in prompts:
        committed(cache, prompt)
        committed(cache, prompt, salt="a")
        committed(cache, prompt, prefix=3)
    assert cached(cache, [99, *PROMPT[1:]]) == cached(cache, prompts[0], salt="b") == 0
    assert cached(cache, prompts[0], prefix=4) == 0
    assert all(cached(cache, prompt) == 8 for prompt in prompts)
    cache.check()


def test_unknown_tokens_are_never_shared(cache: da.PagedKVCache) -> None:
    seq = cache.add(5)
    cache.extend(seq, PROMPT)
    cache.commit(seq, 16)
    assert seq.tokens == [-1] * 5 + PROMPT
    assert cached(cache, seq.length) == 0
    known = cache.add(PROMPT[:4])
    cache.extend(known, 4)
    cache.commit(known, 8)
    assert cached(cache, PROMPT) == 4


def test_the_longest_unused_goes_first_and_the_end_of_a_prompt_before_its_beginning(cache: da.PagedKVCache) -> None:
    prompts = [[n] * 13 for n in range(3)]  # 3 full pages and one more each: the whole pool
    for prompt in prompts:
        cache.free(committed(cache, prompt))
    assert [cached(cache, p) for p in prompts] == [12, 12, 12]
    assert cached(cache, prompts[0]) == 12  # now the latest used
    assert cache.stats().pages_free == 3
    held = cache.add([9] * 17)  # 5 pages: two are taken from the second prompt
    cache.free(held)
    assert [cached(cache, p) for p in prompts] == [12, 4, 12]


def test_pages_in_use_are_never_given_up(cache: da.PagedKVCache) -> None:
    seq = committed(cache, PROMPT)
    for n in range(20):
        cache.free(committed(cache, [n] * 30))
    assert cached(cache, PROMPT) == 8
    assert seq.pages == [0, 1, 2]


def test_equal_prompts_computed_at_once_are_both_whole(cache: da.PagedKVCache) -> None:
    first, second = cache.add([*PROMPT, 1]), cache.add([*PROMPT, 2])
    for seq in (first, second):
        cache.commit(seq, 12)
    assert not set(first.pages) & set(second.pages)
    assert cached(cache, [*PROMPT, 1, 0]) == cached(cache, [*PROMPT, 2, 0]) == 12
    cache.free(first)  # of its pages the second prompt's third goes on from; they are taken for others
    for n in range(5):
        cache.free(cache.add([n] * 36))
    assert cached(cache, [*PROMPT, 2, 0]) == 0
    cache.commit(second, 12)  # offers its own
    assert cached(cache, [*PROMPT, 2, 0]) == 12


def test_what_was_truncated_is_still_found_until_it_is_written_over(cache: da.PagedKVCache) -> None:
    seq = committed(cache, PROMPT)
    cache.truncate(seq, 5)
    assert cached(cache, PROMPT) == 8
    cache.extend(seq, [0])
    assert cached(cache, PROMPT) == 4
    cache.commit(seq, 6)
    cache.extend(seq, [1, 2])
    cache.commit(seq, 8)
    assert cached(cache, [*PROMPT[:5], 0, 1, 2, 3]) == 8


def test_hits_are_counted_in_tokens(cache: da.PagedKVCache) -> None:
    committed(cache, PROMPT)
    cached(cache, PROMPT)
    stats = cache.stats()
    assert stats.lookup_tokens == 22 and stats.hit_tokens == 8 and stats.hit_rate == pytest.approx(8 / 22)
