"""Which requests run in a step, and how many of their tokens: continuous batching (Orca, OSDI 2022) over pages.

Tokens that are next in line to be chosen come first, then chunks of prompts (Sarathi, arXiv 2308.16369), each by age.
Where pages run out, the youngest request gives its own back and waits; the oldest always goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..cache import OutOfPages, PagedKVCache
from .request import Request, Sample, State


@dataclass(frozen=True)
class Work:
    """Of one step: the next `count` tokens of a sample, the last ones of which may be guesses."""

    sample: Sample
    count: int
    guesses: list[int] = field(default_factory=list)
    ready: bool = True  # its last token is computed, so that the next one can be chosen

    @property
    def of_prompt(self) -> bool:
        """A chunk of one; what a verifier put there may be several tokens too, in every step."""
        seq = self.sample.seq
        return self.count > 1 and seq is not None and seq.committed < len(self.sample.request.opening.tokens)


@dataclass(eq=False)
class Scheduler:
    cache: PagedKVCache
    token_budget: int  # of a step, at least max_sequences
    max_sequences: int  # at once
    swap: bool  # what a preempted request had computed is kept in host memory, not computed again
    fail: Callable[[Request, BaseException], None]
    waiting: deque[Request] = field(default_factory=deque)  # the oldest first
    running: list[Request] = field(default_factory=list)  # the oldest first
    preemptions: int = 0
    _refused_at: int | None = None  # pages available when the first one waiting last did not fit

    def plan(self) -> list[Work]:
        for request in tuple(self.running):
            if request.finished:
                self.leave(request)  # what an interrupted step left undone
            self._grow(request)
        live = [sample for request in self.running for sample in request.live]
        work = [Work(sample, 1) for sample in live if self._pending(sample) == 1]  # at most max_sequences
        budget = self.token_budget - len(work)
        for sample in live:
            if self._pending(sample) > 1:
                budget -= self._add_chunk(work, sample, budget)
        while budget > 0 and self.waiting:
            request = self.waiting[0]
            if self._admit(request):
                for sample in request.live:
                    budget -= self._add_chunk(work, sample, budget)
            elif not request.finished:  # it has not failed, it does not fit now
                break
        for at, one in enumerate(work):
            if one.ready and one.count == 1 and (guesses := self._guess(one.sample, budget)):
                work[at] = Work(one.sample, 1 + len(guesses), guesses)
                budget -= len(guesses)
        return work

    def leave(self, request: Request) -> None:
        """Gives back all that the request has, wherever it is."""
        for sample in (*request.samples, *request.ended_beams):
            self.release(sample)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._refused_at = None

    def release(self, sample: Sample) -> None:
        if sample.seq is not None and not sample.seq.freed:
            self.cache.free(sample.seq)
        sample.seq = None

    def rewind(self, sample: Sample, length: int) -> None:
        """Leaves at most the first `length` tokens of the sample in the cache."""
        seq = sample.seq
        if seq is None or seq.length <= length:
            return
        if length >= seq.bidirectional_prefix:
            self.cache.truncate(seq, length)
        else:
            self.release(sample)  # a bidirectional prefix is computed whole, so this one starts anew

    def _pending(self, sample: Sample) -> int:
        """Tokens to be computed before the next one can be chosen."""
        return 0 if sample.seq is None else sample.length - sample.seq.committed

    def _grow(self, request: Request) -> None:
        """Makes room for the tokens that were chosen, at the cost of younger requests, its own at last."""
        while request.state is State.RUNNING:
            try:
                for sample in request.live:
                    self._hold(sample)
                return
            except OutOfPages as error:
                if len(self.running) > 1:
                    self._preempt(self.running[-1])
                else:
                    self.fail(request, error)

    def _hold(self, sample: Sample) -> None:
        """Brings the sample's sequence to all of its tokens, at least the last of them to be computed."""
        request, seq = sample.request, sample.seq
        if seq is not None and (seq.committed >= sample.length or seq.length > sample.length):
            self.rewind(sample, sample.length - 1)
        if sample.seq is None:
            sample.seq = self.cache.add(sample.all_tokens(), request.opening.bidirectional_prefix, request.salt)
        elif sample.seq.length < sample.length:
            self.cache.extend(sample.seq, sample.all_tokens(sample.seq.length))

    def _guess(self, sample: Sample, budget: int) -> list[int]:
        request, seq = sample.request, sample.seq
        room = request.max_tokens - len(sample.tokens) - 1
        guesses = sample.guesses(min(request.params.speculate, budget, room))
        if not guesses or seq is None:
            return []
        try:
            self.cache.extend(seq, guesses)
        except OutOfPages:
            return []
        return guesses

    def _add_chunk(self, work: list[Work], sample: Sample, budget: int) -> int:
        """The tokens of the sample that the step computes. A bidirectional prefix is never split: what is left of the budget
        may be less, but then no other chunk of a prompt is in the step."""
        pending, seq = self._pending(sample), sample.seq
        if pending <= 0 or seq is None:
            return 0
        count = min(pending, budget)
        rest = seq.bidirectional_prefix - seq.committed
        if count < rest and not any(one.of_prompt for one in work):
            count = rest
        if count <= 0 or count < rest:
            return 0
        work.append(Work(sample, count, ready=count == pending))
        return count

    def _admit(self, request: Request) -> bool:
        """Takes the request in if there is room, for it and for the next page of each that runs."""
        live = sum(running.sequences for running in self.running)
        if self.running and live + request.params.sequences > self.max_sequences:
            return False
        available = self.cache.available_pages
        if self.running and self._refused_at is not None and available <= self._refused_at:
            return False
        try:
            self._bring_in(request)
            fits = not self.running or self.cache.available_pages >= live
        except OutOfPages as error:
            fits = False
            if not self.running:
                self.fail(request, error)
                return False
        if not fits:
            self._put_out(request)
            self._refused_at = available
            return False
        self.waiting.popleft()
        request.state = State.RUNNING
        self.running.append(request)  # younger than all that run: preemption and admission keep the order
        self._refused_at = None
        return True

    def _bring_in(self, request: Request) -> None:
        for sample in request.live:
            if sample.seq is not None and sample.seq.swapped:
                self.cache.swap_in(sample.seq)
            self._hold(sample)

    def _put_out(self, request: Request) -> None:
        """Gives the request's pages back. Beams keep what they computed, as they could not catch up with each other, and several
        samples, as each would bring the whole prompt again before one has computed it."""
        several = request.params.beams or len(request.live) > 1
        for sample in request.live:
            seq = sample.seq
            if seq is not None and not seq.swapped:
                if seq.committed > 0 if several else self.swap and seq.committed > seq.cached:
                    self.cache.swap_out(seq)
                else:
                    self.release(sample)

    def _preempt(self, request: Request) -> None:
        self._put_out(request)
        request.state = State.WAITING
        request.preemptions += 1
        self.preemptions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)
        self._refused_at = self.cache.available_pages
