// Operands of products as ldmatrix finds them in a swizzled tile. The rows that the lanes of a warp name lie in 16-byte
// units that no two of 8 have in the same banks.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/swizzle.h"

namespace duplex::sm80 {

// Where a lane's row of four matrices lies: 16 rows and 16 columns of the tile, from its start.
template <class Tile>
struct Fragments {
  uint32_t start;

  // Rows of A, or of a transposed B, whose inner dimension is the rows: upper left, lower left, upper right, lower
  // right.
  DUPLEX_DEVICE static Fragments down(uint32_t tile, int lane) { return at(tile, lane % 16, lane / 16); }
  // B whose inner dimension is the columns: upper left, upper right, lower left, lower right.
  DUPLEX_DEVICE static Fragments across(uint32_t tile, int lane) {
    return at(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  // From row `row` (of 8s) and column 16 * k on: columns flip bits of the swizzle, rows of 8 leave them.
  DUPLEX_DEVICE uint32_t operator()(int row, int k) const {
    constexpr int STEPS = Tile::PANEL / 16;
    return (start ^ (k % STEPS * 32)) + k / STEPS * Tile::PANEL_BYTES + row * Tile::ROW_BYTES;
  }

 private:
  DUPLEX_DEVICE static Fragments at(uint32_t tile, int row, int unit) {
    return {tile + swizzled(row, unit, Tile::ROW_BYTES)};
  }
};

}  // namespace duplex::sm80
