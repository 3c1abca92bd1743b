"""The exact union of attentions over disjoint keys: each part weighted by exp(lse_part - lse)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import load, load_row, store, store_row


@triton.jit(do_not_specialize=["rows", "blocks"])
def merge_kernel(
    outs, lses, out, lse, rows, heads, blocks, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """outs and lses: a tuple of views each. A part without weight adds nothing, whatever it holds."""
    program = tl.program_id(0)
    b, h, row = program // (heads * blocks), program // blocks % heads, program % blocks * BLOCK_M
    live = rows - row
    largest = load_row(lses[0], b, h, row, live, -float("inf"), BLOCK_M)
    for n in tl.static_range(1, len(lses)):
        largest = tl.maximum(largest, load_row(lses[n], b, h, row, live, -float("inf"), BLOCK_M))
    reference = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in tl.static_range(len(outs)):
        weight = tl.exp(load_row(lses[n], b, h, row, live, -float("inf"), BLOCK_M) - reference)
        part = load(outs[n], b, h, row, live, BLOCK_M, BLOCK_D, HEAD_DIM, ALL_LIVE=False).to(tl.float32)
        acc += tl.where(weight[:, None] > 0, part * weight[:, None], 0.0)
        total += weight
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    store(out, b, h, row, live, acc / total[:, None], BLOCK_M, BLOCK_D, HEAD_DIM)
    store_row(lse, b, h, row, live, tl.where(seen, reference + tl.log(total), -float("inf")), BLOCK_M)
