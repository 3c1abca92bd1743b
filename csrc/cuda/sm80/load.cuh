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
  Source q, k, v, dout;  // dout: of backward
};

// Rows from `row` on, of which the first `live` exist; the rest, and what lies behind a row's numbers, becomes 0.
template <class Tile, int THREADS>
DUPLEX_DEVICE void load_tile(uint32_t to, const Source& source, int batch, int row, int head, int live) {
  constexpr int UNITS = Tile::ROW_BYTES / 16, REACH = THREADS / UNITS;  // rows of a panel that the threads have
  constexpr int STEP = REACH < Tile::ROWS ? REACH : Tile::ROWS, SIDE = REACH / STEP;  // rows, panels at a time
  static_assert(Tile::ROWS % STEP == 0 && STEP % 8 == 0 && Tile::PANELS % SIDE == 0);
  const int thread = ptx::anew(ptx::thread_index()), unit = thread % UNITS;
  const int own = thread / UNITS % STEP, panel = thread / UNITS / STEP;
  to += swizzled(own, unit, Tile::ROW_BYTES) + panel * Tile::PANEL_BYTES;
  const int start = 16 * unit + panel * Tile::ROW_BYTES, bytes = source.bytes - start;
  const char* from = source.at(batch, row + own, head) + start;
  live -= own;
  if (source.bytes % 16 == 0) {  // then each unit is there or is not, which costs less
#pragma unroll
    for (int r = 0; r < Tile::ROWS; r += STEP, from += STEP * source.row)
#pragma unroll
      for (int p = 0; p < Tile::PANELS; p += SIDE)
        ptx::copy_async<16>(to + p * Tile::PANEL_BYTES + r * Tile::ROW_BYTES, from + p * Tile::ROW_BYTES,
                            r < live && p * Tile::ROW_BYTES < bytes ? 16 : 0);
  } else {
#pragma unroll 1
    for (int r = 0; r < Tile::ROWS; r += STEP, from += STEP * source.row)
      for (int p = 0; p < Tile::PANELS; p += SIDE)
        ptx::copy_async<16>(to + p * Tile::PANEL_BYTES + r * Tile::ROW_BYTES, from + p * Tile::ROW_BYTES,
                            r < live ? clamp32(bytes - p * Tile::ROW_BYTES, 0, 16) : 0);
  }
}

}  // namespace duplex::sm80
