// Which blocks of keys the rows of a tile visit: edge blocks, where some row misses some key, and inside blocks, which
// need no test. Blocks that no row sees are in neither.
#pragma once

#include <stdint.h>

#include "cuda/lengths.h"

namespace duplex {

// Inside blocks are [0, first) and [inner, inner_end); edges [first, first + gap), [outer, inner), [inner_end,
// outer_end).
struct KeyBlocks {
  int32_t first, gap, outer, inner, inner_end, outer_end;

  DUPLEX_HOST_DEVICE int edges() const { return gap + (inner - outer) + (outer_end - inner_end); }
  DUPLEX_HOST_DEVICE int count() const { return edges() + first + (inner_end - inner); }

  DUPLEX_HOST_DEVICE bool is_edge(int32_t block) const {
    return block >= first && (block < inner || block >= inner_end);
  }

  // The t-th from the first to the last.
  DUPLEX_HOST_DEVICE int in_order(int t) const { return t < first + gap ? t : outer + t - (first + gap); }
  // The t-th, edges before the others.
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

// Of rows [i0, i1), i0 < i1, against blocks of `block` keys counted from the sequence's key 0. On a card all of it fits
// 32 bits (lengths.h: FAR).
DUPLEX_HOST_DEVICE inline KeyBlocks key_blocks(const Span& s, int32_t i0, int32_t i1, int32_t block) {
  const int32_t len_k = int32_t(s.len_k), prefix = int32_t(s.prefix);
  const int32_t begin = int32_t(s.offset) - int32_t(s.left), end = int32_t(s.offset) + int32_t(s.right) + 1;
  const auto up = [block](int32_t x) { return (x + block - 1) / block; };
  const bool empty = begin >= end;                              // no row has a window
  const int32_t first_all = clamp32(i1 - 1 + begin, 0, len_k);  // keys [first_all, last_all) are in all windows,
  const int32_t last_all = empty ? 0 : clamp32(i0 + end, 0, len_k);
  const int32_t low = clamp32(i0 + begin, prefix, len_k);  // keys [low, high) in some, past the prefix
  const int32_t high = empty ? low : clamp32(i1 - 1 + end, low, len_k);

  const int32_t prefix_end = up(prefix), first = prefix / block;
  int32_t outer = prefix_end, outer_end = prefix_end;
  if (low < high) {
    outer = low / block;
    outer_end = up(high) > prefix_end ? up(high) : prefix_end;
  }
  const bool apart = outer > prefix_end;
  const int32_t gap = apart ? prefix_end - first : 0;
  if (!apart) outer = first;
  // A block that the prefix ends in is inside where the window of every row goes on from there.
  const int32_t inner = clamp32(first_all <= prefix ? first : up(first_all), outer, outer_end);
  const int32_t inner_end = clamp32(last_all / block, inner, outer_end);
  return {first, gap, outer, inner, inner_end, outer_end};
}

}  // namespace duplex
