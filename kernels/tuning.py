"""Which tile, how many warps and how deep a pipeline: read from tuning/*.json, one table an architecture.

A table has an entry for every kind of kernel, width of the elements in bits and class of head_dim, so that looking one up is
a dictionary access. `measured` says where its numbers come from. The forward has two kinds: what the other terms of a score and
dropout need beside the tile would leave registers for a smaller one only (forward_terms).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

FOLDER = Path(__file__).parent / "tuning"
HEAD_DIMS = (64, 128, 256)  # a class holds what is at most so wide


class Config(NamedTuple):
    block_m: int  # query rows
    block_n: int  # keys
    num_warps: int
    num_stages: int
    descriptors: bool  # bulk tensor copies for tiles wholly inside a sequence, where strides allow


@cache
def tables() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@cache
def table_for(device: torch.device) -> str:
    """The newest architecture's table that is not newer than the card."""
    if device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(name.removeprefix("sm_")) for name in tables() if name.startswith("sm_"))
    return f"sm_{max(n for n in known if n <= 10 * major + minor)}"


@cache
def config(kernel: str, table: str, bits: int, head_dim: int) -> Config:
    """head_dim is the larger of those of k and v."""
    head_dim_class = next(n for n in HEAD_DIMS if head_dim <= n)
    return Config(**tables()[table][kernel][str(bits)][str(head_dim_class)])


def padded(head_dim: int) -> int:
    """Width of a tile: matrix products take powers of 2, from 16."""
    return max(16, triton.next_power_of_2(head_dim))
