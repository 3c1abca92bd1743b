// Products of whole tiles by a warp, which has ROW_TILES times 16 rows of the result.
#pragma once

#include "cuda/sm80/fragments.cuh"

namespace duplex::sm80 {

// Read anew where they are used: what follows from them would fill registers from loop to loop.
DUPLEX_DEVICE int lane() { return ptx::anew(ptx::thread_index()) % 32; }
DUPLEX_DEVICE int warp() { return ptx::anew(ptx::thread_index()) / 32; }

template <int ROW_TILES, int COUNT>
DUPLEX_DEVICE void set_zero(float (&x)[ROW_TILES][COUNT]) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[r][n] = 0;
}

// D = A B^T, over all of their columns: rows of A from `row` on, all rows of B.
template <class T, class A, class B, int ROW_TILES, int COUNT>
DUPLEX_DEVICE void multiply_rows(float (&d)[ROW_TILES][COUNT], uint32_t a, int row, uint32_t b) {
  static_assert(2 * COUNT == B::ROWS && A::COLUMNS == B::COLUMNS);
  const int lane = sm80::lane();
  const auto left = Fragments<A>::down(a + row * A::ROW_BYTES, lane);
  const auto right = Fragments<B>::across(b, lane);
  set_zero(d);
#pragma unroll
  for (int k = 0; k < A::COLUMNS / 16; ++k) {
    uint32_t rows[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) ptx::load_matrices(rows[r], left(16 * r, k));
#pragma unroll
    for (int n = 0; n < B::ROWS / 16; ++n) {
      uint32_t columns[4];
      ptx::load_matrices(columns, right(16 * n, k));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        ptx::mma<T>(d[r] + 8 * n, rows[r], columns[0], columns[1]);
        ptx::mma<T>(d[r] + 8 * n + 4, rows[r], columns[2], columns[3]);
      }
    }
  }
}

// D += A B: A in registers, all rows of B.
template <class T, class B, int ROW_TILES, int STEPS, int COUNT>
DUPLEX_DEVICE void multiply_registers(float (&d)[ROW_TILES][COUNT], const uint32_t (&a)[ROW_TILES][STEPS][4],
                                      uint32_t b) {
  static_assert(16 * STEPS == B::ROWS && 2 * COUNT == B::COLUMNS);
  const auto right = Fragments<B>::down(b, lane());
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int n = 0; n < B::COLUMNS / 16; ++n) {
      uint32_t columns[4];
      ptx::load_matrices_transposed(columns, right(16 * k, n));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        ptx::mma<T>(d[r] + 8 * n, a[r][k], columns[0], columns[1]);
        ptx::mma<T>(d[r] + 8 * n + 4, a[r][k], columns[2], columns[3]);
      }
    }
}

}  // namespace duplex::sm80
