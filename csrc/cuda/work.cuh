// A tile as the warps of a block see it, and the walk of a block over its tiles.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

struct Place {
  int32_t batch, head;
  int32_t row_q, len_q, row_k, len_k;   // as in Extent
  int32_t prefix, offset, left, right;  // of the span; 32 bits are enough here
};

// Rows from i0 on, against the blocks of keys that they see.
struct Work : Place {
  int32_t i0;
  KeyBlocks keys;
};

// Keys from j0 on, against the blocks of rows that see them; the head is of keys.
struct KeyWork : Place {
  int32_t j0;
  RowBlocks rows;
};

// Calls f(place, span, block of its sequence) for each tile of this block, in order; every warp walks the same way.
template <class F>
DUPLEX_DEVICE void walk(const Lengths& lengths, const Tiles& t, F&& f) {
  const int32_t entries = t.order[0];
  const int64_t tiles = int64_t(entries) * t.heads;
  for (int64_t round = 0;; ++round) {
    const int64_t tile = tile_of(round, ptx::block_index(), ptx::blocks());
    if (round * ptx::blocks() >= tiles) return;
    if (tile >= tiles) continue;
    const TilePlace place = place_of(tile, entries, t.heads, t.section);
    const int32_t entry = t.order[1 + place.rank];
    const int32_t batch = entry / t.entries.blocks;
    const Extent x = extent(lengths, batch);
    const Span& s = x.span;
    f(Place{batch, place.head, x.row_q, x.len_q, x.row_k, x.len_k, int32_t(s.prefix), int32_t(s.offset),
            int32_t(s.left), int32_t(s.right)},
      s, entry % t.entries.blocks);
  }
}

// f(work)
template <class F>
DUPLEX_DEVICE void for_each_tile(const Lengths& lengths, const Tiles& t, F&& f) {
  walk(lengths, t, [&](const Place& place, const Span& s, int32_t block) {
    const int32_t i0 = block * t.entries.block_m;
    f(Work{place, i0, key_blocks(s, i0, end_of(i0, t.entries.block_m, place.len_q), t.entries.block_n)});
  });
}

// The same for dq, whose launches with DISTANCES have the heads from a first one on.
template <bool DISTANCES, class F>
DUPLEX_DEVICE void for_each_row_tile(const BackwardArguments& a, F&& f) {
  for_each_tile(a.lengths, a.row_tiles, [&](const Work& w) {
    if constexpr (DISTANCES) {
      Work moved = w;
      moved.head += a.distances.first_head;
      f(moved);
    } else {
      f(w);
    }
  });
}

template <class F>
DUPLEX_DEVICE void for_each_key_tile(const Lengths& lengths, const Tiles& t, F&& f) {
  walk(lengths, t, [&](const Place& place, const Span& s, int32_t block) {
    const int32_t j0 = block * t.entries.block_n, j1 = end_of(j0, t.entries.block_n, place.len_k);
    f(KeyWork{place, j0, row_blocks(s, place.len_q, j0, j1, t.entries.block_m)});
  });
}

}  // namespace duplex
