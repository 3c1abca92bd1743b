"""Tokens to text as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 8  # tokens of the prompt that a decoder may need to see, as for the space before a word
UNFINISHED = "�"  # what a decoder gives for part of a character


class GrowingText:
    """The text of generated tokens. `ends[n]` is its length after token n; a character's bytes may come in parts."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.prompt = [] if tokenizer is None else list(prompt[-CONTEXT:])
        if tokenizer is not None and tokenizer.decode(self.prompt).endswith(UNFINISHED):
            self.prompt = []
        self.text = ""
        self.ends: list[int] = []
        self._tokens: list[int] = []
        self._restart()

    def _restart(self) -> None:
        self._stream: Any = None
        if self.tokenizer is not None:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(self.prompt, skip_special_tokens=True)

    def push(self, token: int) -> None:
        self._tokens.append(token)
        if self.tokenizer is not None:
            self.text += self._stream.step(self.tokenizer, token) or ""
        self.ends.append(len(self.text))

    def cut(self, count: int) -> None:
        """Back to the first `count` tokens."""
        tokens = self._tokens[:count]
        self.text, self.ends, self._tokens = "", [], []
        self._restart()
        for token in tokens:
            self.push(token)

    def finish(self) -> None:
        """Adds what is left of a character that never became whole."""
        if self.tokenizer is None:
            return
        pending = next((n for n, end in enumerate(self.ends) if end == len(self.text)), len(self.ends)) + 1
        rest = self._tokens[pending:]  # the token at which the text last grew is in it
        if not self.text:
            rest = self._tokens
        tail = self.tokenizer.decode(rest)
        if UNFINISHED in tail:
            self.text += tail
            self.ends[-1] = len(self.text)

    def stopped_at(self) -> int | None:
        """Where the first stop string begins."""
        found = [at for at in map(self.text.find, self.stops) if at >= 0]
        return min(found, default=None)

    def cut_at_stop(self) -> bool:
        """Cuts the text where the first stop string begins, if there is one."""
        at = self.stopped_at()
        if at is not None:
            self.text = self.text[:at]
        return at is not None

    def held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stops):
                return length
        return 0
