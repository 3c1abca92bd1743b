// Products of bfloat16 on the matrix unit of Intel's server processors (AMX), whose tiles are 16 rows of 16 units.
//
// amx_emulated is compiled from the same text for processors without the unit, so that tests run everywhere.
#pragma once

#include <stddef.h>

#include "cpu/kernels/vec.h"

#if defined(DUPLEX_MATRIX_UNIT)
namespace duplex::DUPLEX_ISA {

constexpr int SIDE = 16;  // rows of a tile, and units of a row

#if defined(DUPLEX_ISA_AMX_EMULATED)
inline thread_local uint32_t emulated_tiles[8][SIDE][SIDE];

template <int T>
inline void zero_tile() {
  memset(emulated_tiles[T], 0, sizeof emulated_tiles[T]);
}
template <int T>
inline void load_tile(const void* from, ptrdiff_t row) {
  for (int r = 0; r < SIDE; ++r) memcpy(emulated_tiles[T][r], (const uint32_t*)from + r * row, SIDE * 4);
}
template <int T>
inline void store_tile(void* to, ptrdiff_t row) {
  for (int r = 0; r < SIDE; ++r) memcpy((uint32_t*)to + r * row, emulated_tiles[T][r], SIDE * 4);
}
// As Intel's manual has it: first elements of pairs are summed on their own, second ones too, both are added to c.
template <int C, int A, int B>
inline void multiply_tiles() {
  const auto first = [](vuint pair) { return (vfloat)(pair << 16); };
  const auto second = [](vuint pair) { return (vfloat)(pair & 0xffff0000); };
  for (int r = 0; r < SIDE; ++r) {
    vfloat sums[2] = {};
    for (int t = 0; t < SIDE; ++t) {
      const vuint a = emulated_tiles[A][r][t] - vuint{}, b = load<vuint>(emulated_tiles[B][t]);
      sums[0] = first(a) * first(b) + sums[0];
      sums[1] = second(a) * second(b) + sums[1];
    }
    store(emulated_tiles[C][r], load<vfloat>(emulated_tiles[C][r]) + (sums[0] + sums[1]));
  }
}
struct MatrixUnit {
  MatrixUnit() { memset(emulated_tiles, 0xff, sizeof emulated_tiles); }
};
#else
template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// row: units from one row to the next.
template <int T>
inline void load_tile(const void* from, ptrdiff_t row) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(4 * row) : "memory");
}
template <int T>
inline void store_tile(void* to, ptrdiff_t row) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(4 * row) : "memory");
}
// c[r][x] += sum over t of a[r][t] * b[t][x], pairs of bfloat16 summed in float32.
template <int C, int A, int B>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// The unit is this thread's while one of these lives.
struct MatrixUnit {
  MatrixUnit() {
    alignas(64) static constexpr struct Shape {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
};
#endif

// c[r][x] *= factor[x]
inline void scale_columns(int rows, int vectors, float* c, ptrdiff_t c_row, const float* factor) {
  for (int x = 0; x < vectors; ++x) {
    const vfloat by = load<vfloat>(factor + x * LANES);
    for (int r = 0; r < rows; ++r) store(c + r * c_row + x * LANES, load<vfloat>(c + r * c_row + x * LANES) * by);
  }
}

// c[r][x] = (0 or itself) + sum over t of a[r * a_row + t] * b[t * b_step + x] for 32 rows and 32 columns: tiles 0 to 3
// are sums, 4 and 5 rows of a, 6 and 7 columns of b.
template <bool FROM_ZERO>
inline void matrix_block(int steps, const uint32_t* a, ptrdiff_t a_row, const uint32_t* b, ptrdiff_t b_step, float* c,
                         ptrdiff_t c_row) {
  float* const low = c + SIDE * c_row;
  if constexpr (FROM_ZERO) {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  } else {
    load_tile<0>(c, c_row), load_tile<1>(c + SIDE, c_row);
    load_tile<2>(low, c_row), load_tile<3>(low + SIDE, c_row);
  }
  for (int t = 0; t < steps; t += SIDE) {
    load_tile<4>(a + t, a_row);
    load_tile<6>(b + t * b_step, b_step), multiply_tiles<0, 4, 6>();
    load_tile<7>(b + t * b_step + SIDE, b_step), multiply_tiles<1, 4, 7>();
    load_tile<5>(a + SIDE * a_row + t, a_row), multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(c, c_row), store_tile<1>(c + SIDE, c_row);
  store_tile<2>(low, c_row), store_tile<3>(low + SIDE, c_row);
}

// The same for any multiple of 32 rows, an even number of vectors of x and a multiple of 16 units.
template <bool FROM_ZERO>
inline void matrix_product(int rows, int vectors, int steps, const uint32_t* a, ptrdiff_t a_row, const uint32_t* b,
                           ptrdiff_t b_step, float* c, ptrdiff_t c_row) {
  for (int r = 0; r < rows; r += 2 * SIDE)
    for (int x = 0; x < vectors * LANES; x += 2 * SIDE)
      matrix_block<FROM_ZERO>(steps, a + r * a_row, a_row, b + x, b_step, c + r * c_row + x, c_row);
}

}  // namespace duplex::DUPLEX_ISA
#endif
