// A tile of the forward as loader and computing warps see it, and the walk of a block over its tiles.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex::sm90 {

struct Work {
  Extent at;
  KeyBlocks keys;
  int32_t batch, head, i0;
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
    Work w;
    w.batch = entry / a.entries.blocks;
    w.head = place.head;
    w.i0 = entry % a.entries.blocks * a.entries.block_m;
    w.at = extent(a.lengths, w.batch);
    const int32_t end = w.i0 + a.entries.block_m;
    w.keys = key_blocks(w.at.span, w.i0, end < w.at.len_q ? end : w.at.len_q, a.entries.block_n);
    f(w);
  }
}

}  // namespace duplex::sm90
