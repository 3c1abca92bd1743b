// Which block of the grid does which tile, and when. A tile is a head of an entry; an entry is BLOCK_M rows of a
// sequence. Entries are ranked by what they cost, longest first, so that short ones fill the end.
#pragma once

#include <stdint.h>

#include "cuda/key_blocks.h"
#include "cuda/lengths.h"

namespace duplex {

struct Entries {
  int32_t blocks;  // of rows a sequence has at most
  int32_t block_m, block_n;

  DUPLEX_HOST_DEVICE int64_t count(const Lengths& l) const { return int64_t(l.batch) * blocks; }
};

// Blocks of keys that an entry visits, and one for itself; 0 where the sequence has no such rows.
DUPLEX_HOST_DEVICE inline int32_t cost(const Entries& e, const Lengths& l, int32_t entry) {
  const Extent x = extent(l, entry / e.blocks);
  const int64_t i0 = int64_t(entry % e.blocks) * e.block_m;
  if (i0 >= x.len_q) return 0;
  const int64_t i1 = i0 + e.block_m < x.len_q ? i0 + e.block_m : x.len_q;
  return 1 + key_blocks(x.span, i0, i1, e.block_n).count();
}

// Whether an entry of cost c is done before entry `own` of cost `own_cost`: a strict order, so ranks are a permutation.
DUPLEX_HOST_DEVICE inline bool comes_before(int32_t c, int32_t entry, int32_t own_cost, int32_t own) {
  return c > own_cost || (c == own_cost && entry < own);
}

// The tile that block `block` of `blocks` does in its n-th round: to and fro, so that no block gets the longest each
// time.
DUPLEX_HOST_DEVICE inline int64_t tile_of(int64_t round, int32_t block, int32_t blocks) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

struct TilePlace {
  int32_t rank, head;
};

// Tiles by number: sections of heads whose keys and values share the L2 cache, in each the entries by rank, in each of
// those the section's heads.
DUPLEX_HOST_DEVICE inline TilePlace place_of(int64_t tile, int32_t entries, int32_t heads, int32_t section) {
  const int64_t start = tile / (int64_t(section) * entries) * section;
  const int64_t width = section < heads - start ? section : heads - start;
  const int64_t place = tile - start * entries;
  return {int32_t(place / width), int32_t(start + place % width)};
}

}  // namespace duplex
