"""What a request asks of the sampler; checked when it is made, so that a wrong one never reaches a batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import wrong_type, wrong_value

MAX_SEED = 2**64 - 1
MAX_PENALTY = 32.0  # of a length, whose power must stay a float: 2^30 tokens at most


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    max_tokens: new tokens at most; fewer where the model's positions end.
    temperature: 0 takes the likeliest token (greedy). Else logits are divided by it, and a token is drawn from what
        these leave, in this order: top_k (the k likeliest; 0: all), top_p (the likeliest whose probabilities reach it;
        Holtzman et al. 2019, arXiv 1904.09751), min_p (at least so much of the likeliest one's; arXiv 2407.01082).
        Tokens of equal probability stay or go together.
    seed: 0 to 2^64 - 1; None draws one from torch's generator. The same seed gives the same tokens, in any batch.
    stop: strings before which the text ends. stop_tokens: ids that end it, beside the engine's `eos`, which
        ignore_eos switches off. The token that ended it is among the tokens, never in the text.
    logprobs: None, or how many of the likeliest tokens are told beside each chosen one, with the logarithms of the
        probabilities that the model gave before temperature and the rest.
    n: parallel samples, which share the prompt's pages.
    beam_width: above 1, beam search: the n best of so many beams, by log-probability / length ** length_penalty, which
        is at most 32 either way.
    speculate: tokens guessed ahead at most, by looking up the last ones earlier in the text (prompt lookup); a step
        checks them all. It changes the speed, never the tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    beam_width: int = 1
    length_penalty: float = 1.0
    speculate: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0), ("n", 1), ("beam_width", 1), ("speculate", 0)):
            _check_int(name, getattr(self, name), least)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0)
        for name in ("temperature", "top_p", "min_p", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                wrong_type(name, "a number", type(value).__name__)
            if not abs(value) <= sys.float_info.max:  # of an int too, which may be larger
                wrong_value(name, "a finite number", value)
        if self.temperature < 0:
            wrong_value("temperature", "0 or more", self.temperature)
        if not 0 < self.top_p <= 1:
            wrong_value("top_p", "above 0, up to 1", self.top_p)
        if not 0 <= self.min_p <= 1:
            wrong_value("min_p", "0 to 1", self.min_p)
        if abs(self.length_penalty) > MAX_PENALTY:
            wrong_value("length_penalty", f"{-MAX_PENALTY} to {MAX_PENALTY}", self.length_penalty)
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple_of("stop", "strings", self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_tokens", _tuple_of("stop_tokens", "token ids", self.stop_tokens))
        for text in self.stop:
            if not isinstance(text, str):
                wrong_type("stop", "strings", type(text).__name__)
            if not text:
                wrong_value("stop", "strings that are not empty", "''")
        for token in self.stop_tokens:
            _check_int("stop_tokens", token, 0)
        if self.beam_width > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.n > self.beam_width:
            wrong_value("n", f"at most beam_width ({self.beam_width})", self.n)
        for name, off in (("temperature", 0), ("speculate", 0), ("stop", ()), ("logprobs", None)):
            if getattr(self, name) != off:
                wrong_value(name, f"{off} with beam_width", getattr(self, name))

    @property
    def beams(self) -> bool:
        return self.beam_width > 1

    @property
    def sequences(self) -> int:
        """How many run at once at most."""
        return self.beam_width if self.beams else self.n


def _tuple_of(name: str, expected: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        wrong_type(name, expected, type(values).__name__)


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        wrong_type(name, "an int", type(value).__name__)
    if value < least or (most is not None and value > most):
        wrong_value(name, f"{least} or more" if most is None else f"{least} to {most}", value)
