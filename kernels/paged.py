"""Attention over pages: one program a tile of rows, the heads that share a kv head, and a part of the keys they see.

The query heads of a kv head lie side by side in a tile, row by row, so a key is read once for all of them and decoding fills
more of a matrix product. (Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023.)

Each kind of division (division.py) has two kernels: one computes parts, and finishes rows that have one alone; one merges the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .division import in_order, merge_of, paged_sequence, parts_of, section, sequence_of, tile_of
from .outside import clear, clear_row
from .pages import load_scales, load_stored, places
from .rope import load_rotated
from .span import Sequence, clamp, count, key_blocks, pick
from .tile import LN2, LOG2E, dot, scores, softmax_step

# Kernel arguments that change from call to call: never compiled in.
SIZES = [
    "left", "right", "rows_q", "max_q", "longest", "num_pages", "batch_size", "splits", "blocks", "capacity", "halvings"
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def paged_kernel(
    q, k_pages, v_pages, table, rope, terms, num_pages,
    batch, out, lse, parts_out, parts_lse, sink, left, right, rows_q, max_q, longest, batch_size, width, group, chunks,
    splits, blocks,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, FIXED: tl.constexpr, FLOAT8: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Part t of the keys of a block of rows: of `splits` parts, and of `blocks` blocks of each sequence, the last first."""
    n, kv_head, chunk = work(width, chunks)
    b, block, t = n // (blocks * splits), blocks - 1 - n // splits % blocks, n % splits
    clear_outside(
        batch, out, lse, n, batch_size * blocks * splits, kv_head, chunk, group, batch_size, rows_q, HEADS, BLOCK_M, BLOCK_DV,
        HEAD_DIM_V,
    )  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // HEADS
    s = paged_sequence(batch, b, rows_q, max_q, longest, left, right, TOP_LEFT)
    i0 = block * ROWS
    i1 = tl.minimum(i0 + ROWS, s.len_q)
    if i0 >= i1:
        return
    parts = parts_of(s, i0, i1, splits, BLOCK_N, FIXED)
    if t >= parts.count:
        return
    first = parts.origin + t * parts.size
    seen = section(s, first, tl.minimum(parts.end, first + parts.size))
    r, h, live = packed_rows(kv_head, chunk, group, i1 - i0, HEADS, BLOCK_M)
    acc, total, reference = attend(
        q, k_pages, v_pages, table, rope, terms, num_pages, b, seen, first, i0, i1, i0 + r + s.len_k - s.len_q, kv_head,
        r, h, live, PLAIN, FIXED, FLOAT8, PAGE_SIZE, HEAD_DIM, HEAD_DIM_V, PAIRS, INTERLEAVED, BLOCK_D, BLOCK_DV, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip
    if parts.count > 1:
        store_rows(parts_out, parts_lse, acc, total, reference, n * ROWS, r, h, live, BLOCK_DV, HEAD_DIM_V)
    else:
        finish(out, lse, acc, total, reference, sink, s.row_q + i0, r, h, live, BLOCK_DV, HEAD_DIM_V)


@triton.jit(do_not_specialize=SIZES)
def parts_kernel(
    batch, out, lse, parts_out, parts_lse, sink, left, right, rows_q, max_q, longest, batch_size, width, group, chunks,
    splits, blocks,
    TOP_LEFT: tl.constexpr, FIXED: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n, kv_head, chunk = work(width, chunks)
    b, block = n // blocks, blocks - 1 - n % blocks
    ROWS: tl.constexpr = BLOCK_M // HEADS
    s = paged_sequence(batch, b, rows_q, max_q, longest, left, right, TOP_LEFT)
    i0 = block * ROWS
    i1 = tl.minimum(i0 + ROWS, s.len_q)
    if i0 >= i1:
        return
    parts = parts_of(s, i0, i1, splits, BLOCK_N, FIXED)
    if parts.count > 1:
        r, h, live = packed_rows(kv_head, chunk, group, i1 - i0, HEADS, BLOCK_M)
        merge(
            out, lse, parts_out, parts_lse, sink, 0, 0, 0, n * splits * ROWS, ROWS, parts.count, s.row_q + i0, r, h, live,
            BLOCK_M, BLOCK_DV, HEAD_DIM_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def planned_kernel(
    q, k_pages, v_pages, table, rope, terms, num_pages,
    batch, out, lse, parts_out, parts_lse, sink, left, right, rows_q, max_q, longest, batch_size, width, group, chunks,
    plan, capacity, halvings,
    TOP_LEFT: tl.constexpr, PLAIN: tl.constexpr, FIXED: tl.constexpr, FLOAT8: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Tile n of the plan. SHARED: of the tiles whose keys several sequences share, else of the others."""
    n, kv_head, chunk = work(width, chunks)
    if not SHARED:
        clear_outside(
            batch, out, lse, n, capacity, kv_head, chunk, group, batch_size, rows_q, HEADS, BLOCK_M, BLOCK_DV, HEAD_DIM_V,
        )  # fmt: skip
    if n >= tl.load(plan):
        return
    tile = tile_of(plan, n, batch_size, rows_q, capacity)
    if (tile.shared != 0) != SHARED:
        return
    ROWS: tl.constexpr = BLOCK_M // HEADS
    s = paged_sequence(batch, tile.sequence, rows_q, max_q, longest, left, right, TOP_LEFT)
    first = tile.key // FIXED * FIXED if FIXED else tile.key
    if SHARED:
        length = tl.maximum(tl.minimum(tile.key_end, s.len_k) - first, 0)
        s = Sequence(tile.row, tile.row_end - tile.row, 0, length, length, 0, left, right)
        seen = s
    else:
        seen = section(s, first, tile.key_end)
    begin, end = clamp(tile.row - s.row_q, 0, s.len_q), clamp(tile.row_end - s.row_q, 0, s.len_q)
    for i0 in range(begin, end, ROWS):
        i1 = tl.minimum(i0 + ROWS, end)
        r, h, live = packed_rows(kv_head, chunk, group, i1 - i0, HEADS, BLOCK_M)
        position = i0 + r + s.len_k - s.len_q
        if SHARED and PAIRS != 0:
            position = last_positions(batch, s.row_q + i0 + r, live, batch_size, halvings)
        acc, total, reference = attend(
            q, k_pages, v_pages, table, rope, terms, num_pages, tile.sequence, seen, first, i0, i1, position, kv_head, r, h,
            live, PLAIN, FIXED, FLOAT8, PAGE_SIZE, HEAD_DIM, HEAD_DIM_V, PAIRS, INTERLEAVED, BLOCK_D, BLOCK_DV, BLOCK_M,
            BLOCK_N,
        )  # fmt: skip
        if tile.slot >= 0:
            slot = tile.slot + i0 - begin
            store_rows(parts_out, parts_lse, acc, total, reference, slot, r, h, live, BLOCK_DV, HEAD_DIM_V)
        else:
            finish(out, lse, acc, total, reference, sink, s.row_q + i0, r, h, live, BLOCK_DV, HEAD_DIM_V)


@triton.jit(do_not_specialize=SIZES)
def planned_parts_kernel(
    out, lse, parts_out, parts_lse, sink, rows_q, width, group, chunks, plan, capacity,
    HEADS: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n, kv_head, chunk = work(width, chunks)
    if n >= tl.minimum(tl.load(plan + 1), capacity - 1 - tl.load(plan)):
        return
    m = merge_of(plan, n, rows_q)
    for row in range(m.row, m.row_end, BLOCK_M // HEADS):
        r, h, live = packed_rows(kv_head, chunk, group, m.row_end - row, HEADS, BLOCK_M)
        # Counts and slots of a damaged plan stay inside the workspace.
        size = m.row_end - m.row
        shared = clamp(m.shared_count, 0, capacity // tl.maximum(m.shared_stride, 1))
        own = clamp(m.own_count, 0, capacity // tl.maximum(size, 1))
        shared_slot = clamp(m.shared_slot + row - m.row, 0, tl.maximum(capacity - shared * m.shared_stride, 0))
        own_slot = clamp(m.own_slot, 0, tl.maximum(capacity - own * size, 0)) + row - m.row
        merge(
            out, lse, parts_out, parts_lse, sink, shared_slot, m.shared_stride, shared, own_slot, size, own, row, r, h, live,
            BLOCK_M, BLOCK_DV, HEAD_DIM_V,
        )  # fmt: skip


@triton.jit
def work(width, chunks):
    """Which tile, kv head and chunk of its query heads; heads of one tile are neighbours, as they are in memory."""
    program = tl.program_id(0)
    return program // width, program % width // chunks, program % chunks


@triton.jit
def packed_rows(kv_head, chunk, group, rows, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row of a tile: which of the queries it is, its head, and whether it is one."""
    m = tl.arange(0, BLOCK_M)
    r, g = m // HEADS, chunk * HEADS + m % HEADS
    live = (r < tl.minimum(rows, BLOCK_M // HEADS)) & (g < group)
    return r, tl.where(live, kv_head * group + g, 0), live


@triton.jit
def last_positions(batch, row, live, batch_size, halvings):
    """Of packed rows of any sequences: where in its sequence each stands."""
    if batch.cu_q is None:
        return tl.load(batch.seqlens_k + row, mask=live, other=1) - 1
    else:
        b = tl.minimum(sequence_of(batch.cu_q, row, batch_size, halvings), batch_size - 1)
        return tl.load(batch.seqlens_k + b) - (tl.load(batch.cu_q + 1 + b) - row)


@triton.jit
def places_of(
    turn, turns, plan, EDGE: tl.constexpr, table, b, s, first, num_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Where the keys of that turn's block are; past the last turn, nowhere."""
    j = pick(plan, turn, EDGE) * BLOCK_N + tl.arange(0, BLOCK_N)
    return places(table, b, first + j, j < tl.where(turn < turns, s.len_k, 0), num_pages, PAGE_SIZE)


@triton.jit
def attend(
    q, k_pages, v_pages, table, rope, terms, num_pages, b, s, first, i0, i1, position, kv_head, r, h, live,
    PLAIN: tl.constexpr, FIXED: tl.constexpr, FLOAT8: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows [i0, i1) of s against the keys of s, which begin at key `first` of sequence b's pages.

    Returns the weighted sum of values, the sum of weights, and the natural score that both are relative to.
    """
    rows = q.data + ((s.row_q + i0 + r).to(tl.int64) * q.row + h.to(tl.int64) * q.head)[:, None]
    tile_q = load_rotated(rows, live, position, rope, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED)
    # float8 is multiplied as float16, which holds all of it; what it meets is kept in range by powers of two.
    NARROW: tl.constexpr = FLOAT8 != "" and tile_q.dtype != tl.float32
    if NARROW:
        unit_q = power_of_two(tl.max(tl.abs(tile_q.to(tl.float32)), 1))[:, None]
        tile_q = (tile_q.to(tl.float32) * inverse(unit_q)).to(tl.float16)
    unit_v = power_of_two(0.0)  # of scales so far
    i, head = (i0 + r)[:, None], h[:, None]
    UNIT: tl.constexpr = LN2 if PLAIN else 1.0  # of `largest` and of sums in the exponent
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    plan = key_blocks(s, i0, i1, BLOCK_N)
    if FIXED:
        plan = in_order(plan)
    for EDGE in tl.static_range(1 if FIXED else 0, 2):
        turns = count(plan, EDGE)
        # A turn ahead: where a load of keys waits for one of the same turn, the compiler gives keys and values a single buffer each.
        page, slot = places_of(0, turns, plan, EDGE, table, b, s, first, num_pages, PAGE_SIZE, BLOCK_N)
        for turn in tl.range(0, turns):
            j0 = pick(plan, turn, EDGE) * BLOCK_N
            j = j0 + tl.arange(0, BLOCK_N)
            inside = j < s.len_k
            tile_k = load_stored(
                k_pages, kv_head, page, slot, inside, BLOCK_D, HEAD_DIM, not EDGE, FLOAT8, tile_q.dtype, PLAIN
            )
            products = dot(tile_q, tl.trans(tile_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            if NARROW:
                products *= unit_q
            if k_pages.scales is not None:
                products *= load_scales(k_pages, kv_head, page, slot, inside, not EDGE)[None, :]
            nearest, furthest = j0 - (i1 - 1 + s.offset), j0 + BLOCK_N - 1 - (i0 + s.offset)
            x, _ = scores(products, terms, s, b, head, i, j[None, :], nearest, furthest, (0, first, first), PLAIN, EDGE)
            p, largest, total, decay = softmax_step(x, largest, total, terms, PLAIN, EDGE or not PLAIN)
            if v_pages.scales is not None:
                worth = load_scales(v_pages, kv_head, page, slot, inside, not EDGE)
                if NARROW:
                    unit = tl.maximum(unit_v, power_of_two(tl.max(tl.abs(worth), 0)))
                    decay *= unit_v * inverse(unit)
                    worth *= inverse(unit)
                    unit_v = unit
                p *= worth[None, :]
            tile_v = load_stored(
                v_pages, kv_head, page, slot, inside, BLOCK_DV, HEAD_DIM_V, not EDGE, FLOAT8, tile_q.dtype, PLAIN
            )
            acc = dot(p.to(tile_v.dtype), tile_v, acc * decay[:, None])
            page, slot = places_of(turn + 1, turns, plan, EDGE, table, b, s, first, num_pages, PAGE_SIZE, BLOCK_N)
    if NARROW and v_pages.scales is not None:
        acc *= unit_v
    return acc, total, largest * UNIT


@triton.jit
def power_of_two(x):
    """The one at or below x, which is not negative, within [2^-126, 2^126]."""
    bits = tl.cast(x, tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(power):
    """Of such a power of two, exactly."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def finish(out, lse, acc, total, reference, sink, row, r, h, live, BLOCK_DV: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """Rows that have one part, in the steps of `merge`: how many parts its neighbours have changes no bit of a row."""
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    part_lse = tl.where(seen, reference + tl.log2(total) * LN2, -float("inf"))
    largest, weights = with_sink(part_lse, sink, h, live)
    acc, weights = add_part(tl.zeros_like(acc), weights, largest, acc / total[:, None], part_lse)
    store_rows(out, lse, acc, weights, largest, row, r, h, live, BLOCK_DV, HEAD_DIM_V)


@triton.jit
def merge(
    out, lse, parts_out, parts_lse, sink, shared_slot, shared_stride, shared, own_slot, own_stride, own, row, r, h, live,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """The union of `shared` parts, `shared_stride` slots apart, and of `own` ones, in that order."""
    column = tl.arange(0, BLOCK_DV)[None, :]
    mask = live[:, None] & (column < HEAD_DIM_V)
    at_lse = parts_lse.data + h.to(tl.int64) * parts_lse.head
    at_out = parts_out.data + (h.to(tl.int64) * parts_out.head)[:, None] + column
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for t in range(0, shared + own):
        slot = part_slot(t, shared_slot, shared_stride, shared, own_slot, own_stride, r)
        largest = tl.maximum(largest, tl.load(at_lse + slot * parts_lse.row, mask=live, other=-float("inf")))
    largest, total = with_sink(largest, sink, h, live)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for t in range(0, shared + own):
        slot = part_slot(t, shared_slot, shared_stride, shared, own_slot, own_stride, r)
        part_lse = tl.load(at_lse + slot * parts_lse.row, mask=live, other=-float("inf"))
        part_out = tl.load(at_out + (slot * parts_out.row)[:, None], mask=mask, other=0.0)
        acc, total = add_part(acc, total, largest, part_out, part_lse)
    store_rows(out, lse, acc, total, largest, row, r, h, live, BLOCK_DV, HEAD_DIM_V)


@triton.jit
def part_slot(t, shared_slot, shared_stride, shared, own_slot, own_stride, r):
    return (tl.where(t < shared, shared_slot + t * shared_stride, own_slot + (t - shared) * own_stride) + r).to(
        tl.int64
    )


@triton.jit
def with_sink(largest, sink, h, live):
    """What sums are relative to, and the sum of weights to begin with: the sink is a key without a value."""
    total = tl.zeros(largest.shape, tl.float32)
    if sink is not None:
        extra = tl.load(sink + h, mask=live, other=-float("inf"))
        largest = tl.maximum(largest, extra)
        total = tl.where(extra == -float("inf"), 0.0, tl.exp2((extra - largest) * LOG2E))
    return largest, total


@triton.jit
def add_part(acc, total, reference, part_out, part_lse):
    """One without weight adds nothing, whatever it holds."""
    weight = tl.where(part_lse == -float("inf"), 0.0, tl.exp2((part_lse - reference) * LOG2E))
    return acc + tl.where(weight[:, None] > 0, part_out * weight[:, None], 0.0), total + weight


@triton.jit
def store_rows(out, lse, acc, total, reference, row, r, h, live, BLOCK_DV: tl.constexpr, HEAD_DIM_V: tl.constexpr):
    """The sums as results; a row that saw nothing has 0 and -inf."""
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    column = tl.arange(0, BLOCK_DV)[None, :]
    at = (row + r).to(tl.int64)
    pointers = out.data + (at * out.row + h.to(tl.int64) * out.head)[:, None] + column * out.dim
    tl.store(pointers, (acc / total[:, None]).to(out.data.dtype.element_ty), mask=live[:, None] & (column < HEAD_DIM_V))
    natural = tl.where(seen, reference + tl.log2(total) * LN2, -float("inf"))
    tl.store(lse.data + at * lse.row + h.to(tl.int64) * lse.head, natural, mask=live)


@triton.jit
def clear_outside(
    batch, out, lse, n, programs, kv_head, chunk, group, batch_size, rows_q, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr, HEAD_DIM_V: tl.constexpr,
):  # fmt: skip
    """Rows past the last sequence, of this program's heads: those that are its share among `programs`."""
    if batch.cu_q is not None:
        length = clamp(tl.load(batch.cu_q + batch_size), 0, rows_q)
        end, step = rows_q - length, tl.cast(programs, tl.int64) * BLOCK_M
        for h in range(kv_head * group + chunk * HEADS, kv_head * group + tl.minimum(group, (chunk + 1) * HEADS)):
            for row in range(n.to(tl.int64) * BLOCK_M, end, step):
                clear(out, 0, h, row, end, 0, length, BLOCK_M, BLOCK_DV, HEAD_DIM_V)
                clear_row(lse, 0, h, row, end, 0, length, -float("inf"), BLOCK_M)
