// The one matrix product under every kernel: a register tile of ROWS x (up to VECS) vectors.
#pragma once

#include <stddef.h>

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/vec.h"

namespace duplex::DUPLEX_ISA {

// How products are formed. A unit is four bytes: one float, or two bfloat16 neighbours along the summed dimension.
// A product has a multiple of ROW_STEP rows, sums over a multiple of DEPTH units.
struct Float32 {
  typedef float unit;
  typedef vfloat vector;
  static constexpr bool MATRIX = false;
  struct Hold {};  // of whatever products need, for as long as a task runs
  static constexpr int ROW_STEP = ROWS, DEPTH = 1;
  static constexpr int STEP = 1;  // elements of the summed dimension in a unit
  static constexpr bool EXACT = true;
  static vector splat_unit(unit a) { return splat(a); }
  static vfloat multiply_add(vfloat sum, vector a, vector b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  typedef uint32_t unit;
  typedef vuint vector;
  static constexpr bool MATRIX = false;
  struct Hold {};
  static constexpr int ROW_STEP = ROWS, DEPTH = 1;
  static constexpr int STEP = 2;
  static constexpr bool EXACT = false;
  static vector splat_unit(unit a) { return (vuint)_mm512_set1_epi32(int(a)); }
  static vfloat multiply_add(vfloat sum, vector a, vector b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if defined(DUPLEX_MATRIX_UNIT)
// By the matrix unit: the left operand's units lie side by side, a row after the other.
struct MatrixBFloat16 : BFloat16 {
  static constexpr bool MATRIX = true;
  typedef MatrixUnit Hold;
  static constexpr int ROW_STEP = 2 * SIDE, DEPTH = SIDE;
};
#endif

// What bfloat16 tensors are multiplied as.
#if defined(DUPLEX_MATRIX_UNIT)
typedef MatrixBFloat16 Bf16Product;
#elif defined(__AVX512BF16__)
typedef BFloat16 Bf16Product;
#else
typedef Float32 Bf16Product;
#endif

enum class Start { ZERO, ADD, SCALE };

// c[r][x] = start + sum over t of a[r * a_row + t * a_step] * b[t * b_step + x], for ROWS rows and V vectors of x.
// Start: zero, c itself, or c times factor[x]; added last, so that the sum over t rounds relative to itself.
template <class P, int V, Start START>
inline void product_tile(int steps, const typename P::unit* a, ptrdiff_t a_row, ptrdiff_t a_step,
                         const typename P::unit* b, ptrdiff_t b_step, float* c, ptrdiff_t c_row,
                         const float* factor = nullptr) {
  vfloat sum[ROWS][V] = {};
  for (int t = 0; t < steps; ++t) {
    typename P::vector right[V];
#pragma GCC unroll 3
    for (int x = 0; x < V; ++x) right[x] = load<typename P::vector>(b + x * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename P::vector left = P::splat_unit(a[r * a_row]);
#pragma GCC unroll 3
      for (int x = 0; x < V; ++x) sum[r][x] = P::multiply_add(sum[r][x], left, right[x]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int x = 0; x < V; ++x) {
      float* to = c + r * c_row + x * LANES;
      if (START == Start::ADD) sum[r][x] += load<vfloat>(to);
      if (START == Start::SCALE) sum[r][x] += load<vfloat>(to) * load<vfloat>(factor + x * LANES);
      store(to, sum[r][x]);
    }
}

// Steps that are summed one after another; longer sums are sums of such. Shorter where products round on their own.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int CHAIN = 64;
#else
constexpr int CHAIN = 32;
#endif

// The same for any multiple of P::ROW_STEP rows and any number of vectors.
template <class P, Start START>
inline void product(int rows, int vectors, int steps, const typename P::unit* a, ptrdiff_t a_row, ptrdiff_t a_step,
                    const typename P::unit* b, ptrdiff_t b_step, float* c, ptrdiff_t c_row,
                    const float* factor = nullptr) {
#if defined(DUPLEX_MATRIX_UNIT)
  if constexpr (P::MATRIX) {
    static_assert(START != Start::SCALE);
    return matrix_product<START == Start::ZERO>(rows, vectors, steps, a, a_row, b, b_step, c, c_row);
  }
#endif
  for (int x = 0; x < vectors;) {
    const int left = vectors - x;
    const int take = left >= VECS && left != VECS + 1 ? VECS : left >= 2 ? 2 : 1;  // 4 = 2 + 2, never 3 + 1
    const auto tile = [&]<Start FROM>(int r, int first, int count) {
      const auto* ar = a + r * a_row + first * a_step;
      const auto* bx = b + first * b_step + x * LANES;
      float* cx = c + r * c_row + x * LANES;
      const float* fx = FROM == Start::SCALE ? factor + x * LANES : nullptr;
      if (take == 3) product_tile<P, 3, FROM>(count, ar, a_row, a_step, bx, b_step, cx, c_row, fx);
      if (take == 2) product_tile<P, 2, FROM>(count, ar, a_row, a_step, bx, b_step, cx, c_row, fx);
      if (take == 1) product_tile<P, 1, FROM>(count, ar, a_row, a_step, bx, b_step, cx, c_row, fx);
    };
    for (int r = 0; r < rows; r += ROWS) {
      tile.template operator()<START>(r, 0, steps < CHAIN ? steps : CHAIN);
      for (int t = CHAIN; t < steps; t += CHAIN)
        tile.template operator()<Start::ADD>(r, t, steps - t < CHAIN ? steps - t : CHAIN);
    }
    x += take;
  }
}

}  // namespace duplex::DUPLEX_ISA
