// Which block of the grid does which tile, and when. A tile is a head of an entry; an entry is BLOCK_M rows of a
// sequence, or BLOCK_N of its keys. Entries are ranked by what they cost, longest first, so that short ones fill the
// end.
#pragma once

#include <stdint.h>

#include "cuda/key_blocks.h"
#include "cuda/lengths.h"
#include "cuda/row_blocks.h"

namespace duplex {

struct Entries {
  int32_t blocks;  // of rows, or of keys, a sequence has at most
  int32_t block_m, block_n;
  bool keys;  // entries are of keys

  DUPLEX_HOST_DEVICE int64_t count(const Lengths& l) const { return int64_t(l.batch) * blocks; }
};

// What [start, start + block) has of the first `length`: where it ends.
DUPLEX_HOST_DEVICE inline int64_t end_of(int64_t start, int32_t block, int32_t length) {
  return start + block < length ? start + block : length;
}

// Blocks of keys (of rows) that an entry visits, and one for itself; 0 where the sequence has no such rows (keys).
DUPLEX_HOST_DEVICE inline int32_t cost(const Entries& e, const Lengths& l, int32_t entry) {
  const Extent x = extent(l, entry / e.blocks);
  const int32_t block = e.keys ? e.block_n : e.block_m, length = e.keys ? x.len_k : x.len_q;
  const int64_t start = int64_t(entry % e.blocks) * block;
  if (start >= length) return 0;
  const int64_t end = end_of(start, block, length);
  return 1 + (e.keys ? row_blocks(x.span, x.len_q, start, end, e.block_m).count()
                     : key_blocks(x.span, start, end, e.block_n).count());
}

// Whether an entry of cost c is done before entry `own` of cost `own_cost`: a strict order, so ranks are a permutation.
DUPLEX_HOST_DEVICE inline bool comes_before(int32_t c, int32_t entry, int32_t own_cost, int32_t own) {
  return c > own_cost || (c == own_cost && entry < own);
}

// The tile that block `block` of `blocks` does in its n-th round: to and fro, so that no block gets the longest each
// time.
DUPLEX_HOST_DEVICE inline int32_t place_of_block(int64_t round, int32_t block, int32_t blocks) {
  return round % 2 ? blocks - 1 - block : block;
}
DUPLEX_HOST_DEVICE inline int64_t tile_of(int64_t round, int32_t block, int32_t blocks) {
  return round * blocks + place_of_block(round, block, blocks);
}

// Whether all entries cost the same: every row sees every key, and nothing about lengths lies on the device.
inline bool all_alike(const Lengths& l) {
  const int32_t reach = l.max_q > l.max_k ? l.max_q : l.max_k;
  return !(l.cu_q || l.cu_k || l.len_q || l.len_k || l.start_q || l.start_k || l.prefix) && l.left >= reach &&
         l.right >= reach;
}

// Entries by rank, as the schedule kernel writes them. Without such an order, entries are alike, and ranked as they
// are.
struct Order {
  static constexpr int32_t HEAD = 2;  // how many entries there are; how many tiles have been taken; then the entries
  int32_t* data;

  DUPLEX_HOST_DEVICE static int64_t size(int64_t entries) { return HEAD + entries; }
  DUPLEX_HOST_DEVICE int32_t* taken() const { return data ? data + 1 : nullptr; }
  DUPLEX_HOST_DEVICE int32_t& rank(int32_t n) const { return data[HEAD + n]; }
};

// What a kernel walks over.
struct Tiles {
  Entries entries;
  Order order;
  int32_t heads, section;

  DUPLEX_HOST_DEVICE int32_t count(const Lengths& l) const {
    return order.data ? order.data[0] : int32_t(entries.count(l));
  }
  DUPLEX_HOST_DEVICE int32_t entry(int32_t rank) const { return order.data ? order.rank(rank) : rank; }
};

struct TilePlace {
  int32_t rank, head;
};

// Tiles by number: sections of heads whose keys and values share the L2 cache, in each the entries by rank, in each of
// those the section's heads. What sections leave over comes first: the last one should have many tiles, whose short
// ones then fill the end.
DUPLEX_HOST_DEVICE inline TilePlace place_of(int64_t tile, int32_t entries, int32_t heads, int32_t section) {
  const int64_t rest = heads % section, rest_tiles = rest * entries;
  const bool first = tile < rest_tiles;
  const int64_t start = first ? 0 : rest + (tile - rest_tiles) / (int64_t(section) * entries) * section;
  const int64_t width = first ? rest : section;
  const int64_t place = tile - start * entries;
  return {int32_t(place / width), int32_t(start + place % width)};
}

}  // namespace duplex
