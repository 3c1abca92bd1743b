"""Which program does which block of which head.

Programs run roughly in the order of their number. A section is as many heads as keep their keys and values in the L2 cache together;
sections follow each other, and within one the blocks with the longest rows come first (the last queries of a causal mask, or the
first keys), so that short work fills the end. Heads that share a kv head are neighbours. All of it lies on the grid's x axis, which
reaches 2^31 - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

L2_BYTES = 16 * 2**20  # of keys and values at a time; an A100 has 40 MiB, shared by all that runs, smaller cards less

# Kernel arguments that change from call to call: never compiled in.
SIZES = ["left", "right", "rows_q", "rows_k", "max_q", "max_k", "batch_size", "section", "blocks"]


def section(heads: int, group: int, bytes_each: int) -> int:
    """Heads of a section, in whole groups: `bytes_each` is what the programs of one group read again and again."""
    return min(heads, group * max(1, L2_BYTES // max(1, bytes_each)))


@triton.jit
def job(heads, section, blocks, LAST_FIRST: tl.constexpr):
    """Of the heads of all sequences one, and of its `blocks` blocks one."""
    program = tl.program_id(0)
    start = program // (section * blocks) * section
    width = tl.minimum(section, heads - start)
    place = program - start * blocks
    block = place // width
    if LAST_FIRST:
        block = blocks - 1 - block
    return start + place % width, block
