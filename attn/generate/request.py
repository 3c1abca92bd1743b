"""A request and its samples: what was asked, what has come, what may be shown."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..cache import Sequence as CachedSequence
from ..modules.language_model import Opening
from .params import SamplingParams
from .sampling import Draw, TokenLogprob, uniform
from .speculate import Lookup
from .text import GrowingText
from .verify import Draft, Verifier

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """What a stream yields: what is new of one sample."""

    index: int  # which sample
    text: str
    tokens: list[int]  # may run ahead of the text, where that waits for a whole character or may become a stop string
    finish_reason: str | None


@dataclass(frozen=True)
class Output:
    """One sample, whole."""

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None  # "stop", "length", "cancelled", "error"; None while it goes on
    logprobs: list[TokenLogprob | None] | None  # a token that a verifier put there has none
    cumulative_logprob: float | None  # of beams


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sample:
    """One continuation of the prompt, and its sequence in the cache.

    `tokens` is the truth; the cache holds all of them but the last, or fewer. What it holds more, of guesses or of a
    step that was interrupted, is truncated before the next step.
    """

    request: Request
    index: int
    text: GrowingText
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cumulative: float = 0.0
    seq: CachedSequence | None = None
    finish_reason: str | None = None
    accepted: int = 0  # tokens that a verifier accepted; the others may not be shown yet
    rejections: int = 0
    banned: dict[int, set[int]] = field(default_factory=dict)  # by place
    lookup: Lookup = field(default_factory=Lookup)
    shown_tokens: int = 0
    shown_text: int = 0

    @property
    def length(self) -> int:
        return len(self.request.opening.tokens) + len(self.tokens)

    def all_tokens(self, start: int = 0) -> list[int]:
        """Of opening and continuation, from `start` on."""
        opening = self.request.opening.tokens
        return opening[start:] + self.tokens if start < len(opening) else self.tokens[start - len(opening) :]

    def draw(self, ahead: int = 0) -> Draw:
        """What the row of logits is asked for that chooses the next token, or one `ahead` of it."""
        place, request = len(self.tokens) + ahead, self.request
        number = uniform(request.seed, self.index, place, self.rejections) if request.params.temperature else 0.0
        return Draw(request.params, number, self.banned.get(place, ()))

    def guesses(self, most: int) -> list[int]:
        return self.lookup.guess(self.all_tokens(), most) if most > 0 else []

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.text.push(token)

    def cut(self, count: int) -> None:
        """Takes back all but the first `count` tokens, and forgets what was banned after them."""
        del self.tokens[count:], self.logprobs[count:]
        self.text.cut(count)
        self.banned = {place: tokens for place, tokens in self.banned.items() if place <= count}

    def draft(self, finished: bool) -> Draft:
        return Draft(self.text.text, tuple(self.tokens), self.accepted, finished, self.index, tuple(self.text.ends))

    def show(self) -> None:
        """Puts what may be shown, and was not yet, where a stream finds it."""
        text, done = self.text.text, self.finish_reason is not None
        whole = self.finish_reason in ("stop", "length")
        ready = len(self.tokens)
        if not whole and (self.request.verifier is not None or self.request.params.beams):
            ready = self.accepted
        end = len(text) if whole else min(self.text.ends[ready - 1] if ready else 0, len(text) - self.text.held_back())
        end = max(end, self.shown_text)
        ready = max(ready, self.shown_tokens)
        if done or ready > self.shown_tokens or end > self.shown_text:
            fresh = text[self.shown_text : end], self.tokens[self.shown_tokens : ready]
            self.request.chunks.append(Chunk(self.index, *fresh, self.finish_reason))
            self.shown_tokens, self.shown_text = ready, end


@dataclass(eq=False)
class Request:
    """A handle: what `Engine.submit` returns. `outputs` may be read at any time."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    tokenizer: Tokenizer | None
    opening: Opening
    room: int  # new tokens that the model and the cache have room for
    salt: bytes | None = None
    verifier: Verifier | None = None
    stop_tokens: frozenset[int] = frozenset()
    state: State = State.WAITING
    error: BaseException | None = None  # why it failed
    preemptions: int = 0
    samples: list[Sample] = field(default_factory=list)
    ended_beams: list[Sample] = field(default_factory=list)
    chunks: deque[Chunk] = field(default_factory=deque)  # not yet taken by a stream
    owner: object = None  # what its engine knows it by, and no more: a handle does not keep the engine's cache

    def __post_init__(self) -> None:
        self.samples = [self.sample(0)]

    def sample(self, index: int) -> Sample:
        return Sample(self, index, GrowingText(self.tokenizer, self.opening.context, self.params.stop))

    @property
    def max_tokens(self) -> int:
        """New tokens of a sample at most."""
        return min(self.params.max_tokens, self.room)

    @property
    def live(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.finish_reason is None]

    @property
    def sequences(self) -> int:
        """That it has, or will have once its prompt is computed."""
        return len(self.live) if self.samples[0].tokens else self.params.sequences

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    @property
    def outputs(self) -> list[Output]:
        told = self.params.logprobs is not None
        return [
            Output(
                sample.index,
                sample.text.text,
                list(sample.tokens),
                sample.finish_reason,
                list(sample.logprobs) if told else None,
                sample.cumulative if self.params.beams else None,
            )
            for sample in self.samples
        ]

    @property
    def tokens(self) -> list[int]:
        """Of the first, or best, sample."""
        return list(self.samples[0].tokens)

    @property
    def text(self) -> str:
        return self.samples[0].text.text


def finish_reason(sample: Sample) -> str | None:
    """Why the sample ends with its last token, if it does; cuts its text at a stop string."""
    if sample.text.cut_at_stop():
        return "stop"
    if sample.tokens and sample.tokens[-1] in sample.request.stop_tokens:
        return "stop"
    if len(sample.tokens) < sample.request.max_tokens:
        return None
    sample.text.finish()  # the rest of a token may hold a stop string too
    return "stop" if sample.text.cut_at_stop() else "length"
