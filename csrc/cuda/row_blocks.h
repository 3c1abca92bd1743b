// Which blocks of rows see the keys of a tile: edge blocks, where some key is hidden from some row, and inside blocks,
// which need no test. Blocks none of whose rows sees any of the keys are in neither.
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

// Edges are [outer, inner) and [inner_end, outer_end), inside blocks [inner, inner_end).
struct RowBlocks {
  int32_t outer, inner, inner_end, outer_end;

  DUPLEX_HOST_DEVICE int edges() const { return (inner - outer) + (outer_end - inner_end); }
  DUPLEX_HOST_DEVICE int count() const { return outer_end - outer; }

  // The t-th to visit; edges come first.
  DUPLEX_HOST_DEVICE int at(int t) const {
    if (t < inner - outer) return outer + t;
    t -= inner - outer;
    return t < outer_end - inner_end ? inner_end + t : inner + t - (outer_end - inner_end);
  }
};

// Of keys [j0, j1), j0 < j1 <= s.len_k, against blocks of `block` rows counted from the sequence's row 0.
DUPLEX_HOST_DEVICE inline RowBlocks row_blocks(const Span& s, int32_t len_q, int64_t j0, int64_t j1, int32_t block) {
  const auto within = [](int64_t x, int64_t low, int64_t high) { return int32_t(x < low ? low : x > high ? high : x); };
  const auto up = [block](int32_t x) { return (x + block - 1) / block; };
  const bool empty = s.left + s.right < 0;                 // no row has a window
  const int64_t windowed = j0 < s.prefix ? s.prefix : j0;  // keys [windowed, j1) are left to the windows
  // Some of rows [low, high) see a key, all of [first, last) all.
  int32_t low = 0, high = len_q, first = 0, last = len_q;
  if (j0 >= s.prefix) {
    low = within(j0 - s.right - s.offset, 0, len_q);
    high = empty ? low : within(j1 + s.left - s.offset, low, len_q);
  }
  if (j1 > s.prefix) {
    first = within(j1 - 1 - s.right - s.offset, 0, len_q);
    last = empty ? first : within(windowed + s.left - s.offset + 1, first, len_q);
  }
  const int32_t outer = low / block, outer_end = low < high ? up(high) : outer;
  // The last block is whole where the sequence ends in it.
  const int32_t inner = within(up(first), outer, outer_end);
  const int32_t inner_end = within(last == len_q ? up(last) : last / block, inner, outer_end);
  return {outer, inner, inner_end, outer_end};
}

}  // namespace duplex
