// Products of whole tiles by a warpgroup.
#pragma once

#include "cuda/ptx.cuh"

namespace duplex::sm90 {

// D = A B^T, over all of their columns: 64 rows of A from `row` on, all rows of B.
template <class T, class A, class B, int COUNT>
DUPLEX_DEVICE void multiply_rows(float (&d)[COUNT], uint32_t a, int row, uint32_t b) {
  static_assert(2 * COUNT == B::ROWS && A::COLUMNS == B::COLUMNS);
#pragma unroll
  for (int k = 0; k < A::COLUMNS / 16; ++k)
    ptx::wgmma<T, Major::K, Major::K>(d, columns_operand<A>(a, row, k), columns_operand<B>(b, 0, k), k > 0);
  ptx::wgmma_commit();
}

// D = A B + D: 64 rows of A from `row` on, all rows of B.
template <class T, class A, class B, int COUNT>
DUPLEX_DEVICE void add_product(float (&d)[COUNT], uint32_t a, int row, uint32_t b) {
  static_assert(A::COLUMNS == B::ROWS && 2 * COUNT == B::COLUMNS);
#pragma unroll
  for (int k = 0; k < A::COLUMNS / 16; ++k)
    ptx::wgmma<T, Major::K, Major::MN>(d, columns_operand<A>(a, row, k), rows_operand<B>(b, k), true);
  ptx::wgmma_commit();
}

// D = A B (+ D): 64 rows of A in registers, all rows of B.
template <class T, class B, int STEPS, int COUNT>
DUPLEX_DEVICE void multiply_registers(float (&d)[COUNT], const uint32_t (&a)[STEPS][4], uint32_t b, bool accumulate) {
  static_assert(16 * STEPS == B::ROWS && 2 * COUNT == B::COLUMNS);
#pragma unroll
  for (int k = 0; k < STEPS; ++k) ptx::wgmma<T, Major::MN>(d, a[k], rows_operand<B>(b, k), accumulate || k > 0);
  ptx::wgmma_commit();
}

// D = A^T B: the 64 columns of A, as many columns of B as D has, from the start of a panel on.
template <class T, class A, class B, int COUNT>
DUPLEX_DEVICE void multiply_columns(float (&d)[COUNT], uint32_t a, uint32_t b) {
  static_assert(A::ROWS == B::ROWS && A::COLUMNS == 64 && A::PANELS == 1 && 2 * COUNT % B::PANEL == 0);
#pragma unroll
  for (int k = 0; k < A::ROWS / 16; ++k)
    ptx::wgmma<T, Major::MN, Major::MN>(d, rows_operand<A>(a, k), rows_operand<B>(b, k), k > 0);
  ptx::wgmma_commit();
}

// Rows of a tile from `live` on become 0: what lies behind a sequence may be anything, NaN too, and 0 * NaN is NaN.
// The caller fences and meets the others.
template <class Tile>
DUPLEX_DEVICE void clear_rows(uint32_t tile, int live, int thread, int threads) {
  constexpr int UNITS = Tile::ROW_BYTES / 16;
  for (int u = live * UNITS + thread; u < Tile::ROWS * UNITS; u += threads)
    for (int p = 0; p < Tile::PANELS; ++p) ptx::shared_zero16(tile + p * Tile::PANEL_BYTES + u * 16);
}

}  // namespace duplex::sm90
