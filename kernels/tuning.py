"""Which tile, how many warps and how deep a pipeline: read from tuning/*.json, one table an architecture or a card.

A table has an entry for every kind of kernel, width of the elements in bits and class of head_dim, so that looking one up is
a dictionary access. `measured` says where its numbers come from. What the other terms of a score and dropout need beside the tile
leaves registers for a smaller one only, so forward, dq and dkdv have a second kind for calls with any of them (forward_terms).

A card's own table, named as the card, holds what was measured to be faster on it; all else is that of the architecture which it
`inherits`. So does that of cards with little shared memory, for what would not fit there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

FOLDER = Path(__file__).parent / "tuning"
HEAD_DIMS = (64, 128, 256)  # a class holds what is at most so wide
SMALL = {(8, 6): "sm_86", (8, 9): "sm_86", (12, 0): "sm_86", (12, 1): "sm_86"}  # 99 KiB of shared memory a program


class Config(NamedTuple):
    block_m: int  # query rows
    block_n: int  # keys
    num_warps: int
    num_stages: int
    descriptors: bool  # bulk tensor copies for tiles wholly inside a sequence, where strides allow
    values_behind: bool = False  # the forward's values are multiplied one block behind


@cache
def tables() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@cache
def table_for(device: torch.device) -> str:
    """The card's own table, or its architecture's."""
    if device.type == "cpu":
        return "interpreter"
    own = file_name(torch.cuda.get_device_name(device))
    return own if own in tables() else architecture(*torch.cuda.get_device_capability(device))


def architecture(major: int, minor: int) -> str:
    """The newest architecture's table that is not newer than the card, or that for its little shared memory."""
    if (small := SMALL.get((major, minor))) is not None:
        return small
    known = [int(name.removeprefix("sm_")) for name in tables() if name.startswith("sm_") and base(name) == name]
    return f"sm_{max(n for n in known if n <= 10 * major + minor)}"


def base(table: str) -> str:
    """The architecture's table that another one stands on."""
    while "inherits" in tables()[table]:
        table = tables()[table]["inherits"]
    return table


def file_name(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@cache
def config(kernel: str, table: str, bits: int, head_dim: int) -> Config:
    """head_dim is the larger of those of k and v."""
    head_dim_class = next(n for n in HEAD_DIMS if head_dim <= n)
    found = tables()[table].get(kernel, {}).get(str(bits), {}).get(str(head_dim_class))
    if found is None:
        return config(kernel, tables()[table]["inherits"], bits, head_dim)
    return Config(**found)


# Each forgets something that is kept and follows from the tables.
derived: list[Callable[[], None]] = [table_for.cache_clear, config.cache_clear]


def adopt(name: str, table: dict[str, Any]) -> None:
    """Adds a table, or puts it in another's place, for this process."""
    tables()[name] = table
    for forget in derived:
        forget()


@contextmanager
def trial(table: str, kernel: str, bits: int, head_dim_class: int, tried: Config) -> Iterator[None]:
    """Within, that one configuration is another."""
    before = tables()[table]
    kinds = before.get(kernel, {})
    widths = kinds.get(str(bits), {})
    adopt(table, {**before, kernel: {**kinds, str(bits): {**widths, str(head_dim_class): tried._asdict()}}})
    try:
        yield
    finally:
        adopt(table, before)


def padded(head_dim: int) -> int:
    """Width of a tile: matrix products take powers of 2, from 16."""
    return max(16, triton.next_power_of_2(head_dim))


def padded_values(head_dim_v: int, head_dim: int) -> int:
    """Width of a tile of values beside one of keys: as wide as shared memory tells widths apart by how it swizzles rows, up to 128 bytes.

    Where values are narrower and take the place of keys in shared memory, the ptxas of Triton 3.3 to 3.6 (CUDA 12.8) has matrix products
    on Hopper read most of them from wrong addresses: wrong numbers, or the end of the process.
    """
    return max(padded(head_dim_v), min(padded(head_dim), 64))
