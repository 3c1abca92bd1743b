"""Checked generation: what a verifier sees as text grows, and what it may answer.

A verifier is any callable that takes a `Draft` and returns a `Verdict`. It is called after each new token, before the
stream shows anything of it. What it accepts is shown and stays; only what came after can be taken back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """What was generated so far, by one sample of a request."""

    text: str  # of the tokens; empty where the engine has no tokenizer
    tokens: Sequence[int]
    accepted: int  # tokens that were accepted before
    finished: bool  # it ends here, unless the answer takes something back
    index: int  # which of the request's samples
    ends: Sequence[int]  # the length of the text after each token

    def token_at(self, character: int) -> int:
        """The token that the character (its place in `text`) came with."""
        return bisect_right(self.ends, character)


@dataclass(frozen=True)
class Accept:
    """All of it is good."""


@dataclass(frozen=True)
class Wait:
    """Undecided: goes on, and shows nothing until it is accepted. What is undecided at the end is shown."""


@dataclass(frozen=True)
class Reject:
    """Takes back token `to` and all after it; another one is chosen in its place.

    A token rejected there stays banned while those before it stay.
    """

    to: int


@dataclass(frozen=True)
class Replace:
    """Takes back token `to` and all after it; `by`, text or tokens, stands there instead and is accepted."""

    to: int
    by: str | Sequence[int]


Verdict = Accept | Wait | Reject | Replace
Verifier = Callable[[Draft], Verdict]
