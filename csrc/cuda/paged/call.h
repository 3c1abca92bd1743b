// What crosses into the paged kernels.
#pragma once

#include "common/problem.h"
#include "cuda/arguments.h"
#include "cuda/divider.h"
#include "cuda/paged/sequence.h"

namespace duplex::paged {

struct Call {
  Batch batch;
  View q, out;                  // (packed row, head) of 16-bit numbers
  bool q_vectors, out_vectors;  // rows are read, and written, 16 bytes at a time
  float* lse;                   // (heads_q, packed rows)
  Pages pages;
  Divider page_size;
  Rope rope;
  Terms terms;
  const float* sink;                                                  // (heads_q,) or null
  int32_t num_pages, heads_q, heads_kv, group, head_dim, head_dim_v;  // group: query heads of a kv head
  float *parts, *parts_lse;                                           // (slots, heads_q, head_dim_v), (heads_q, slots)
  int32_t slots;
  const int32_t* plan;  // or null: the division
  int32_t capacity;     // rows of the plan
  Division division;
};

// How query heads lie in the rows of a tile: row by row, `heads` of those that share a kv head, side by side.
struct Packing {
  int32_t heads;   // of a row in one tile
  int32_t chunks;  // tiles for all of a kv head
  int32_t rows;    // in a tile
};

inline Packing packing(int32_t group, int32_t tile_rows) {
  const int32_t heads = group < tile_rows ? group : tile_rows;
  return {heads, (group + heads - 1) / heads, tile_rows / heads};
}

constexpr int SMALL_ROWS = 16, LARGE_ROWS = 64;  // of the two tiles

// Of a plan's tiles, those of rows that share their keys, or the others.
enum class Which { ALL, SHARED, OWN };

// What a launch does: of each of `units`, tiles of the plan or pieces of the division, the heads of its kv heads.
struct Grid {
  Which which;
  int32_t units;
  Packing pack;
  Divider heads, chunks, width;  // of pack.heads and pack.chunks; width: shares of a unit

  static Grid of(const Call& c, int32_t tile_rows, Which which, int32_t units) {
    const Packing pack = packing(c.group, tile_rows);
    return {which,
            units,
            pack,
            Divider::of(pack.heads),
            Divider::of(pack.chunks),
            Divider::of(int64_t(c.heads_kv) * pack.chunks)};
  }
  DUPLEX_HOST_DEVICE int32_t shares() const { return units * int32_t(width.divisor); }
};

}  // namespace duplex::paged
