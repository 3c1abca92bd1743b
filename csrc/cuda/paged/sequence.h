// How a paged call is divided: into rows of a sequence (or of all that share a prefix) and a part of the keys that they
// see. By a plan (common/plan.h), or on the device from lengths, into numbers of blocks and parts that follow from
// shapes alone, so that a CUDA graph holds for any lengths. Contents are not trusted: no read passes a tensor.
#pragma once

#include "common/plan.h"
#include "cuda/divider.h"
#include "cuda/lengths.h"

namespace duplex::paged {

constexpr int32_t FIXED_SPLIT = duplex::FIXED_SPLIT;
constexpr int32_t LEAST_SPLIT = 256;  // keys: below it, a merge costs more than it gains

struct Batch {
  const int32_t *seqlens_k, *cu_q, *prefix;  // cu_q null: one row a sequence; prefix may be null
  int32_t batch, rows_q, max_q;
  int32_t longest;      // keys that the block table and the pool hold of a sequence
  int32_t left, right;  // within [-FAR, FAR]
  bool top_left;
};

// Its keys are counted from 0.
DUPLEX_HOST_DEVICE inline Extent extent(const Batch& l, int b) {
  const RowRange q = l.cu_q ? row_range(l.cu_q, nullptr, nullptr, b, l.rows_q, l.max_q) : RowRange{b, 1};
  const int32_t len_k = clamp32(l.seqlens_k[b], 0, l.longest), prefix = l.prefix ? clamp32(l.prefix[b], 0, len_k) : 0;
  return {q.row, q.length, 0, len_k, {len_k, prefix, l.top_left ? 0 : len_k - q.length, l.left, l.right}};
}

// How many sequences end at or before a token.
DUPLEX_HOST_DEVICE inline int32_t sequence_of(const int32_t* cu, int64_t token, int32_t batch) {
  int32_t low = 0;
  for (int32_t high = batch; low < high;) {
    const int32_t middle = low + (high - low) / 2;
    if (cu[middle + 1] <= token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Where in its sequence a packed row stands.
DUPLEX_HOST_DEVICE inline int32_t position_of(const Batch& l, int32_t row) {
  if (!l.cu_q) return l.seqlens_k[row] - 1;
  const int32_t found = sequence_of(l.cu_q, row, l.batch), b = found < l.batch ? found : l.batch - 1;
  return l.seqlens_k[b] - (l.cu_q[b + 1] - row);
}

// Without a plan: of `blocks` blocks of `rows` rows for each sequence, the last first, and `splits` parts of each.
struct Division {
  Divider blocks, splits;
  int32_t rows;
  Divider block;  // of keys; divides where parts begin, unless that is fixed
  bool fixed;
};

// Keys [origin, end) of a block of rows, in parts of so many. The first one is there even without keys.
struct Parts {
  int32_t origin, size, end;

  DUPLEX_HOST_DEVICE int32_t first(int32_t t) const { return origin + t * size; }
  DUPLEX_HOST_DEVICE bool has(int32_t t) const { return t == 0 || first(t) < end; }
  DUPLEX_HOST_DEVICE int32_t count() const { return has(1) ? (end - origin + size - 1) / size : 1; }
};

// Of what rows [i0, i1) may see, a gap between prefix and window included.
DUPLEX_HOST_DEVICE inline Parts parts_of(const Extent& x, int32_t i0, int32_t i1, const Division& d) {
  const int32_t offset = int32_t(x.span.offset), prefix = int32_t(x.span.prefix);
  const int32_t last = i1 + offset + int32_t(x.span.right), first = i0 + offset - int32_t(x.span.left);
  const int32_t end = clamp32(last > prefix ? last : prefix, 0, x.len_k),
                begin = prefix > 0 ? 0 : clamp32(first, 0, end);
  if (d.fixed) return {begin / FIXED_SPLIT * FIXED_SPLIT, FIXED_SPLIT, end};
  const int32_t origin = d.block.down(begin);
  const int32_t even = d.block.up(d.splits.quotient(end - origin + int32_t(d.splits.divisor) - 1));
  return {origin, even > LEAST_SPLIT ? even : LEAST_SPLIT, end};
}

// Rows [begin, end) of a sequence against keys of its pages from `first` on.
struct Piece {
  int32_t sequence, row;  // row: the packed row of i = 0
  int32_t begin, end;
  int32_t first;
  int32_t slot;      // of row `begin`'s partial results; -1: results are final
  int32_t position;  // of i = 0 in the sequence, where rows are of one
  bool shared;       // rows of several sequences, all of which see all of the keys
  Span span;         // as its keys are counted from `first`
};

DUPLEX_HOST_DEVICE inline Span section(const Span& s, int32_t first, int32_t end) {
  const int32_t whole = (end < s.len_k ? end : int32_t(s.len_k)) - first, length = whole > 0 ? whole : 0;
  return {length, clamp32(int32_t(s.prefix) - first, 0, length), s.offset - first, s.left, s.right};
}

// The n-th block of rows; false where there is none.
struct BlockOfRows {
  int32_t sequence, begin, end;
  Extent of;
};
DUPLEX_HOST_DEVICE inline bool block_of(const Batch& l, const Division& d, int32_t n, BlockOfRows& rows) {
  const auto [b, from_last] = d.blocks.divide(n);
  const Extent x = extent(l, b);
  const int32_t begin = (int32_t(d.blocks.divisor) - 1 - from_last) * d.rows, end = begin + d.rows;
  rows = {b, begin, end < x.len_q ? end : x.len_q, x};
  return rows.begin < rows.end;
}

// The n-th piece; false where there is none.
DUPLEX_HOST_DEVICE inline bool piece_of(const Batch& l, const Division& d, int32_t n, Piece& piece) {
  const auto [of_rows, t] = d.splits.divide(n);
  BlockOfRows rows;
  if (!block_of(l, d, of_rows, rows)) return false;
  const Extent& x = rows.of;
  const Parts parts = parts_of(x, rows.begin, rows.end, d);
  if (!parts.has(t)) return false;
  const int32_t first = parts.first(t), end = first + parts.size;
  piece = {rows.sequence,     x.row_q, rows.begin,
           rows.end,          first,   parts.has(1) ? n * d.rows : -1,
           x.len_k - x.len_q, false,   section(x.span, first, end < parts.end ? end : parts.end)};
  return true;
}

// The n-th tile of a plan of `capacity` rows; false where there is none, or not of this kind.
DUPLEX_HOST_DEVICE inline bool piece_of(const Batch& l, const int32_t* plan, int32_t capacity, bool shared, bool fixed,
                                        int32_t n, Piece& piece) {
  const auto& header = *reinterpret_cast<const PlanHeader*>(plan);
  if (n >= header.tiles) return false;
  const PlanTile tile = reinterpret_cast<const PlanTile*>(plan)[1 + n];
  if ((tile.shared != 0) != shared) return false;
  const int32_t b = clamp32(tile.sequence, 0, l.batch - 1), row = clamp32(tile.row_begin, 0, l.rows_q);
  const int32_t row_end = clamp32(tile.row_end, row, l.rows_q), last = capacity - (row_end - row);
  const int32_t key = clamp32(tile.key_begin, 0, l.longest), key_end = clamp32(tile.key_end, key, l.longest);
  const int32_t slot = tile.slot < last ? tile.slot : last, first = fixed ? key / FIXED_SPLIT * FIXED_SPLIT : key;
  const Extent x = extent(l, b);
  if (shared) {
    const int32_t end = key_end < x.len_k ? key_end : x.len_k, length = end > first ? end - first : 0;
    piece = {b, row, 0, row_end - row, first, slot, 0, true, {length, length, 0, l.left, l.right}};
  } else {
    const int32_t begin = clamp32(row - x.row_q, 0, x.len_q), end = clamp32(row_end - x.row_q, 0, x.len_q);
    piece = {b, x.row_q, begin, end, first, slot, x.len_k - x.len_q, false, section(x.span, first, key_end)};
  }
  return piece.begin < piece.end;
}

// Rows [row, row_end) whose results lie in parts: `shared` of them, and `own` ones, so many slots apart.
struct Union {
  int32_t row, row_end;
  int32_t shared_slot, shared, shared_stride;
  int32_t own_slot, own, own_stride;

  DUPLEX_HOST_DEVICE int64_t slot(int32_t part, int32_t at_row) const {
    const int64_t first =
        part < shared ? shared_slot + int64_t(part) * shared_stride : own_slot + int64_t(part - shared) * own_stride;
    return first + (at_row - row);
  }
};

DUPLEX_HOST_DEVICE inline bool union_of(const Batch& l, const Division& d, int32_t n, Union& u) {
  BlockOfRows rows;
  if (!block_of(l, d, n, rows)) return false;
  const Parts parts = parts_of(rows.of, rows.begin, rows.end, d);
  const int32_t row = rows.of.row_q, slot = n * int32_t(d.splits.divisor) * d.rows;
  u = {row + rows.begin, row + rows.end, 0, 0, 0, slot, parts.count(), d.rows};
  return parts.has(1);
}

// Counts and slots of a damaged plan stay inside the workspace.
DUPLEX_HOST_DEVICE inline bool union_of(const Batch& l, const int32_t* plan, int32_t capacity, int32_t n, Union& u) {
  const auto& header = *reinterpret_cast<const PlanHeader*>(plan);
  const int32_t tiles = clamp32(header.tiles, 0, capacity - 1);
  if (n >= header.merges || n >= capacity - 1 - tiles) return false;
  const PlanMerge m = reinterpret_cast<const PlanMerge*>(plan)[1 + tiles + n];
  const int32_t row = clamp32(m.row_begin, 0, l.rows_q), row_end = clamp32(m.row_end, row, l.rows_q);
  const int32_t size = row_end - row > 0 ? row_end - row : 1;
  const int32_t stride = m.shared_stride > size ? m.shared_stride : size;
  const int32_t shared = clamp32(m.shared_count, 0, capacity / stride), own = clamp32(m.own_count, 0, capacity / size);
  u = {row,    row_end, clamp32(m.shared_slot, 0, capacity - shared * stride),
       shared, stride,  clamp32(m.own_slot, 0, capacity - own * size),
       own,    size};
  return row < row_end && shared + own > 0;
}

}  // namespace duplex::paged
