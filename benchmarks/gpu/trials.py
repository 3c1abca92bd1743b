"""Calls under one configuration after another, each as quick on the host as under the only one.

Whatever follows from the tables is forgotten when one changes, also which compiled kernel a launch came to. To look for that anew
takes the host longer than many a kernel takes, and the card would be timed waiting for it. So each configuration keeps what it found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from duplex_attn.kernels import launch, tuning
from duplex_attn.kernels.tuning import Config

Answer = TypeVar("Answer")


class Trials:
    """Of one entry of a table, while all others stay as they are."""

    def __init__(self, table: str, kernel: str, bits: int, head_dim_class: int) -> None:
        self.entry = table, kernel, bits, head_dim_class
        self.found: dict[Config, dict[Any, Any]] = defaultdict(dict)

    def call(self, tried: Config, call: Callable[[], Answer]) -> Answer:
        with tuning.trial(*self.entry, tried):
            launch._bound.update(self.found[tried])
            try:
                return call()
            finally:
                self.found[tried] = dict(launch._bound)
