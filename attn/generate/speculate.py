"""Speculation by prompt lookup: what followed the last tokens when they came before, may follow them again.

Saxena 2023, "Prompt Lookup Decoding"; checked by the model itself, as in Leviathan et al. 2022 (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must be the same


class Lookup:
    """Where each run of tokens stood last. It follows a list that grows, and may lose its end."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}  # of the token after the run
        self._read = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow; none where the last ones are new."""
        self._read = min(self._read, len(tokens) - 1)
        for end in range(self._read, len(tokens)):  # runs that have a token after them
            for size in range(SHORTEST, LONGEST + 1):
                if end >= size:
                    self._places[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        for size in range(LONGEST, SHORTEST - 1, -1):
            run = tuple(tokens[-size:])
            place = self._places.get(run)
            if place is not None and place < len(tokens) and tuple(tokens[place - size : place]) == run:
                return list(tokens[place : place + count])
        return []
