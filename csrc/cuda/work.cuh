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

  DUPLEX_DEVICE static Work of(const Place& place, const Span& s, int32_t block, const Entries& e) {
    const int32_t i0 = block * e.block_m;
    return {place, i0, key_blocks(s, i0, end_of(i0, e.block_m, place.len_q), e.block_n)};
  }
};

// Keys from j0 on, against the blocks of rows that see them; the head is of keys.
struct KeyWork : Place {
  int32_t j0;
  RowBlocks rows;

  DUPLEX_DEVICE static KeyWork of(const Place& place, const Span& s, int32_t block, const Entries& e) {
    const int32_t j0 = block * e.block_n;
    return {place, j0, row_blocks(s, place.len_q, j0, end_of(j0, e.block_n, place.len_k), e.block_m)};
  }
};

// Of the tile-th of `entries` entries and all heads.
template <class W>
DUPLEX_DEVICE W work_of(const Lengths& lengths, const Tiles& t, int32_t entries, int64_t tile) {
  const TilePlace place = place_of(tile, entries, t.heads, t.section);
  const int32_t entry = t.entry(place.rank), batch = entry / t.entries.blocks;
  const Extent x = extent(lengths, batch);
  const Span& s = x.span;
  return W::of({batch, place.head, x.row_q, x.len_q, x.row_k, x.len_k, int32_t(s.prefix), int32_t(s.offset),
                int32_t(s.left), int32_t(s.right)},
               s, entry % t.entries.blocks, t.entries);
}

// Calls f(work) for each tile of this block, in an order that follows from the grid alone; every warp walks the same
// way.
template <class W, class F>
DUPLEX_DEVICE void walk(const Lengths& lengths, const Tiles& t, F&& f) {
  const int32_t entries = t.count(lengths);
  const int64_t tiles = int64_t(entries) * t.heads;
  for (int64_t round = 0; round * ptx::blocks() < tiles; ++round)
    if (const int64_t tile = tile_of(round, ptx::block_index(), ptx::blocks()); tile < tiles)
      f(work_of<W>(lengths, t, entries, tile));
}

// Of a launch with DISTANCES, which has the heads from a first one on.
template <bool DISTANCES>
DUPLEX_DEVICE Work moved(const BackwardArguments& a, Work w) {
  if constexpr (DISTANCES) w.head += a.distances.first_head;
  return w;
}

}  // namespace duplex
