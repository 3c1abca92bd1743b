// Rows from global memory into tiles of shared memory, by all threads of a block.
#pragma once

#include "cuda/lengths.h"
#include "cuda/ptx.cuh"
#include "cuda/swizzle.h"

namespace duplex::sm80 {

// (head_dim, row, head, batch) of 16-bit numbers; strides in bytes.
struct Source {
  const char* data;
  int64_t row, head, batch;
  int32_t bytes;  // of a row that are numbers

  DUPLEX_DEVICE const char* at(int64_t b, int64_t r, int64_t h) const { return data + b * batch + r * row + h * head; }
};

struct Sources {
  Source q, k, v;
};

// The rows from `from` on, of which the first `live` exist; the rest, and what lies behind a row's numbers, becomes 0.
template <class Tile, int THREADS>
DUPLEX_DEVICE void load_tile(uint32_t to, const Source& rows, const char* from, int live) {
  constexpr int UNITS = Tile::ROW_BYTES / 16, STEP = THREADS / UNITS;  // rows at a time
  static_assert(Tile::ROWS % STEP == 0 && STEP % 8 == 0);
  const int row = ptx::thread_index() / UNITS, unit = ptx::thread_index() % UNITS;
  to += swizzled(row, unit, Tile::ROW_BYTES);
  from += row * rows.row + 16 * unit;
#pragma unroll
  for (int r = 0; r < Tile::ROWS; r += STEP, from += STEP * rows.row) {
    const int bytes = row + r < live ? rows.bytes - 16 * unit : 0;
#pragma unroll
    for (int p = 0; p < Tile::PANELS; ++p)
      ptx::copy_async<16>(to + p * Tile::PANEL_BYTES + r * Tile::ROW_BYTES, from + p * Tile::ROW_BYTES,
                          clamp32(bytes - p * Tile::ROW_BYTES, 0, 16));
  }
}

}  // namespace duplex::sm80
