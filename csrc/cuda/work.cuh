// A tile of the forward as the warps of a block see it, and the walk of a block over its tiles.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

struct Work {
  int32_t batch, head, i0;
  int32_t row_q, len_q, row_k, len_k;   // as in Extent
  int32_t prefix, offset, left, right;  // of the span; 32 bits are enough here
  KeyBlocks keys;
};

// Calls f(work) for each tile of this block, in order; every warp walks the same way.
template <class F>
DUPLEX_DEVICE void for_each_tile(const ForwardArguments& a, F&& f) {
  const int32_t entries = a.order[0];
  const int64_t tiles = int64_t(entries) * a.heads_q;
  for (int64_t round = 0;; ++round) {
    const int64_t tile = tile_of(round, ptx::block_index(), ptx::blocks());
    if (round * ptx::blocks() >= tiles) return;
    if (tile >= tiles) continue;
    const TilePlace place = place_of(tile, entries, a.heads_q, a.section);
    const int32_t entry = a.order[1 + place.rank];
    const int32_t batch = entry / a.entries.blocks, i0 = entry % a.entries.blocks * a.entries.block_m;
    const Extent x = extent(a.lengths, batch);
    const Span& s = x.span;
    const int32_t end = i0 + a.entries.block_m < x.len_q ? i0 + a.entries.block_m : x.len_q;
    f(Work{batch, place.head, i0, x.row_q, x.len_q, x.row_k, x.len_k, int32_t(s.prefix), int32_t(s.offset),
           int32_t(s.left), int32_t(s.right), key_blocks(s, i0, end, a.entries.block_n)});
  }
}

}  // namespace duplex
