// Which blocks of keys the rows of a tile visit: edge blocks, where some row misses some key, and inside blocks, which
// need no test. Blocks that no row sees are in neither.
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

// Inside blocks are [0, first) and [inner, inner_end); edges [first, first + gap), [outer, inner), [inner_end,
// outer_end).
struct KeyBlocks {
  int32_t first, gap, outer, inner, inner_end, outer_end;

  DUPLEX_HOST_DEVICE int edges() const { return gap + (inner - outer) + (outer_end - inner_end); }
  DUPLEX_HOST_DEVICE int count() const { return edges() + first + (inner_end - inner); }

  // The t-th to visit; edges come first.
  DUPLEX_HOST_DEVICE int at(int t) const {
    if (t < gap) return first + t;
    t -= gap;
    if (t < inner - outer) return outer + t;
    t -= inner - outer;
    if (t < outer_end - inner_end) return inner_end + t;
    t -= outer_end - inner_end;
    return t < first ? t : inner + t - first;
  }
};

// Of rows [i0, i1), i0 < i1, against blocks of `block` keys counted from the sequence's key 0.
DUPLEX_HOST_DEVICE inline KeyBlocks key_blocks(const Span& s, int64_t i0, int64_t i1, int32_t block) {
  // Rows fit 32 bits, in which a division is a fifth of one in 64.
  const auto within = [](int64_t x, int64_t low, int64_t high) { return int32_t(x < low ? low : x > high ? high : x); };
  const auto up = [block](int32_t x) { return (x + block - 1) / block; };
  const bool empty = s.left + s.right < 0;                        // no row has a window
  const int32_t first_all = within(s.first(i1 - 1), 0, s.len_k);  // keys [first_all, last_all) are in all windows,
  const int32_t last_all = empty ? 0 : within(s.last(i0) + 1, 0, s.len_k);
  const int32_t low = within(s.first(i0), s.prefix, s.len_k);  // keys [low, high) in some, past the prefix
  const int32_t high = empty ? low : within(s.last(i1 - 1) + 1, low, s.len_k);

  const int32_t prefix = int32_t(s.prefix), prefix_end = up(prefix), first = prefix / block;
  int32_t outer = prefix_end, outer_end = prefix_end;
  if (low < high) {
    outer = low / block;
    outer_end = up(high) > prefix_end ? up(high) : prefix_end;
  }
  const bool apart = outer > prefix_end;
  const int32_t gap = apart ? prefix_end - first : 0;
  if (!apart) outer = first;
  // A block that the prefix ends in is inside where the window of every row goes on from there.
  const int32_t inner = within(first_all <= s.prefix ? first : up(first_all), outer, outer_end);
  const int32_t inner_end = within(last_all / block, inner, outer_end);
  return {first, gap, outer, inner, inner_end, outer_end};
}

}  // namespace duplex
