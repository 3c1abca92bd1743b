// Products on the matrix unit (AMX): tiles of 16 rows of 16 units, multiplied where registers cannot be had for them.
//
// "amx_emulated" is compiled from the same text for processors without the unit, so that tests run everywhere.
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
template <int C, int A, int B>
inline void multiply_tiles() {
  for (int r = 0; r < SIDE; ++r) {
    vfloat sum = load<vfloat>(emulated_tiles[C][r]);
    for (int t = 0; t < SIDE; ++t)
      sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(emulated_tiles[A][r][t])),
                                     (__m512bh)load<vuint>(emulated_tiles[B][t]));
    store(emulated_tiles[C][r], sum);
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

}  // namespace duplex::DUPLEX_ISA
#endif
