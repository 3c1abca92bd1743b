// How a tile lies in shared memory for tensor cores and copy engine: panels of rows, each row as wide as the swizzle.
// Within groups of 8 rows, the 16-byte units of a row change places by an exclusive or with the row's number.
// (PTX ISA, "Asynchronous warpgroup level matrix instructions: shared memory matrix layout".)
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

// Whether the products' inner dimension (K) or the outer one (M or N) is contiguous in memory.
enum class Major { K, MN };

// (ROWS, COLUMNS) of 16-bit numbers in panels of 64 or 32 columns, where nothing else is said the widest that fit.
template <int ROWS_, int COLUMNS_, int PANEL_ = COLUMNS_ % 64 == 0 ? 64 : 32>
struct Tile {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, PANEL = PANEL_;
  static constexpr int PANELS = COLUMNS / PANEL;
  static constexpr int ROW_BYTES = PANEL * 2;
  static constexpr int PANEL_BYTES = ROWS * ROW_BYTES;
  static constexpr int BYTES = PANELS * PANEL_BYTES;
  static constexpr int GROUP_BYTES = 8 * ROW_BYTES;
  static_assert((PANEL == 64 || PANEL == 32) && COLUMNS % PANEL == 0 && ROWS % 8 == 0);
};

// A matrix descriptor: address in bits 0-13, leading and stride offsets from 16 and 32, all in units of 16 bytes;
// bits 62-63 are 1 for a swizzle of 128 bytes, 2 for 64. Shared memory ends before 2^18, so that operands of a tile are
// one addition apart: `start` is shifted once for all of them.
DUPLEX_HOST_DEVICE constexpr uint64_t descriptor(uint32_t start, uint32_t offset, uint32_t leading, uint32_t stride,
                                                 int row_bytes) {
  const uint32_t low = (start >> 4) + ((offset >> 4) + (leading >> 4 << 16));
  return low | uint64_t((stride >> 4) + ((row_bytes == 128 ? 1u : 2u) << 30)) << 32;
}

// The k-th 16 columns of a tile as an operand whose inner dimension is the columns, from row `row` on (of 8s).
template <class T>
DUPLEX_HOST_DEVICE constexpr uint64_t columns_operand(uint32_t tile, int row, int k) {
  const int column = 16 * k;
  const uint32_t offset = column / T::PANEL * T::PANEL_BYTES + column % T::PANEL * 2;
  return descriptor(tile + row * T::ROW_BYTES, offset, 16, T::GROUP_BYTES, T::ROW_BYTES);
}

// The k-th 16 rows of a tile, all of its columns, as an operand whose inner dimension is the rows.
template <class T>
DUPLEX_HOST_DEVICE constexpr uint64_t rows_operand(uint32_t tile, int k) {
  return descriptor(tile, 16 * k * T::ROW_BYTES, T::PANEL_BYTES, T::GROUP_BYTES, T::ROW_BYTES);
}

// Where the 16-byte unit `unit` of a row of a panel lies, from the panel's start, which is a multiple of 1024.
DUPLEX_HOST_DEVICE constexpr int swizzled(int row, int unit, int row_bytes) {
  return row * row_bytes + ((unit ^ (row_bytes == 128 ? row & 7 : row >> 1 & 3)) << 4);
}

}  // namespace duplex
