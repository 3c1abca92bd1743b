"""A cache whose slots hold, in place of keys, a number that depends on all that keys depend on.

The key of a token depends on the tokens before it, on the salt, and on the whole bidirectional prefix. Wherever a page
is shared wrongly, copied too late or not at all, or written under a reader, a sequence reads another number than it
should. `Simulation` makes each call on the runtime and on plain lists, and compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from duplex_attn import OutOfPages, _runtime

State = int
UNLIKE = itertools.count(1)


@dataclass(eq=False)
class Simulated:
    """What a sequence must be."""

    seq: _runtime.Sequence
    start: State
    prefix: int
    tokens: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)  # of each token
    committed: int = 0
    saved: list[list[State]] | None = None  # the pages of a swapped-out sequence

    def grow(self, tokens: Iterable[int]) -> None:
        state = self.states[-1] if self.states else self.start
        for token in tokens:
            state = hash((state, token if token >= 0 else -next(UNLIKE)))  # unknown: like no other
            self.tokens.append(token)
            self.states.append(state)


class Simulation:
    def __init__(self, num_pages: int, page_size: int, hash_bits: int = 64):
        self.cache = _runtime.Cache(num_pages, page_size, hash_bits)
        self.page_size = page_size
        self.slots: list[list[State]] = [[0] * page_size for _ in range(num_pages)]
        self.live: list[Simulated] = []

    def add(self, tokens: list[int], prefix: int = 0, salt: str | None = None) -> Simulated | None:
        available = self.cache.available_pages
        try:
            seq = self.cache.add(tokens, prefix, salt)
        except OutOfPages:
            assert self.pages(len(tokens)) > available - len(tokens) // self.page_size
            assert self.cache.available_pages == available
            return None
        start = hash((salt, tuple(tokens[:prefix])))
        made = Simulated(seq, start, prefix, committed=seq.cached)
        made.grow(tokens)
        assert seq.cached % self.page_size == 0 and seq.cached < max(len(tokens), 1)
        assert seq.cached == 0 or seq.cached >= prefix
        self.live.append(made)
        self.verify(made)
        return made

    def extend(self, s: Simulated, tokens: list[int], known: bool = True) -> bool:
        """By the tokens, or by as many that are unknown."""
        pages, available = s.seq.pages, self.cache.available_pages
        try:
            self.cache.extend(s.seq, tokens if known else len(tokens))
        except OutOfPages:
            assert self.pages(len(s.tokens) + len(tokens)) - len(pages) + 1 > available  # 1: a copy on write
            assert s.seq.pages == pages and s.seq.length == len(s.tokens)
            assert self.cache.available_pages == available
            return False
        s.grow(tokens if known else [-1] * len(tokens))
        return True

    def append(self, chosen: list[Simulated], tokens: list[int]) -> bool:
        available = self.cache.available_pages
        try:
            self.cache.append([s.seq for s in chosen], tokens)
        except OutOfPages:
            assert len(chosen) > available == self.cache.available_pages
            assert all(s.seq.length == len(s.tokens) for s in chosen)
            return False
        for s, token in zip(chosen, tokens, strict=True):
            s.grow([token])
        return True

    def fork(self, s: Simulated) -> Simulated:
        twin = Simulated(self.cache.fork(s.seq), s.start, s.prefix, s.tokens[:], s.states[:], s.committed)
        assert twin.seq.pages == s.seq.pages
        self.live.append(twin)
        return twin

    def truncate(self, s: Simulated, length: int) -> None:
        self.cache.truncate(s.seq, length)
        del s.tokens[length:], s.states[length:]
        s.committed = min(s.committed, length)

    def free(self, s: Simulated) -> None:
        self.cache.free(s.seq)
        self.live.remove(s)

    def step(self, chosen: list[Simulated], new: list[int] | None = None, commit: bool = True) -> None:
        """Computes the next tokens: what is written is there at once, and committed or not."""
        rows = self.cache.batch([s.seq for s in chosen], new)
        self.make_copies()
        for b, s in enumerate(chosen):
            end = len(s.tokens) if new is None else s.committed + new[b]
            pages, size = s.seq.pages, self.page_size
            for n in range(s.committed, end):
                self.slots[pages[n // size]][n % size] = s.states[n]
            if commit:
                s.committed = end
        if commit:
            self.cache.commit_batch(rows)

    def make_copies(self) -> None:
        if self.cache.has_pending_copies:
            sources, targets = self.cache.pending_copies()
            contents = [self.slots[page][:] for page in sources]  # all at once, as a kernel would
            for page, content in zip(targets, contents, strict=True):
                self.slots[page] = content
            self.cache.copies_made()

    def swap_out(self, s: Simulated) -> None:
        self.make_copies()
        s.saved = [self.slots[page][:] for page in self.cache.written_pages(s.seq)]
        self.cache.swap_out(s.seq)

    def swap_in(self, s: Simulated) -> bool:
        try:
            found = self.cache.swap_in(s.seq)
        except OutOfPages:
            return False
        assert s.saved is not None
        for page, content in zip(self.cache.written_pages(s.seq)[found:], s.saved[found:], strict=True):
            self.slots[page] = content[:]
        self.cache.commit(s.seq, s.committed)
        s.saved = None
        return True

    def verify(self, s: Simulated) -> None:
        """The sequence reads what it must. Before a step, content that a copy is still to bring is read where it is."""
        seq = s.seq
        assert seq.length == len(s.tokens)
        if s.saved is not None:
            assert seq.swapped and seq.pages == []
            return
        coming = dict(zip(*reversed(self.cache.pending_copies()), strict=True)) if self.cache.has_pending_copies else {}
        held: list[State] = []
        for page in seq.pages[: self.pages(s.committed)]:
            held += self.slots[coming.get(page, page)]
        assert held[: s.committed] == s.states[: s.committed]

    def check(self) -> None:
        assert self.cache.check() == []
        for s in self.live:
            self.verify(s)
            assert s.seq.tokens == s.tokens and s.seq.committed == s.committed

    def pages(self, length: int) -> int:
        return -(-length // self.page_size)
