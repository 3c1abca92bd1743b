// Tensor rows of any dtype to and from the units the products read. Everything past the end is zero, so that what lies
// there (NaN included) never enters a sum.
#pragma once

#include "cpu/kernels/tile.h"

namespace duplex::DUPLEX_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out pieces of a task's scratch; with base null it only counts bytes.
struct Carver {
  char* base;
  size_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = (T*)(base + bytes);
    bytes += round_up(count * sizeof(T), 64) + 64;  // 64 more keep equal offsets of neighbours out of one cache set
    return at;
  }
};

template <class E>
inline vfloat widen_partial(const E* from, int count) {
  E padded[LANES] = {};
  memcpy(padded, from, count * sizeof(E));
  return widen(padded);
}

template <class E>
inline void narrow_partial(E* to, vfloat v, int count) {
  E padded[LANES];
  narrow(padded, v);
  memcpy(to, padded, count * sizeof(E));
}

// rows x dim elements as floats: to[r * to_row + x], zero for x in [dim, to_row) and for rows [rows, padded_rows).
template <class E>
inline void widen_rows(float* to, int64_t to_row, const E* from, int64_t from_row, int rows, int padded_rows, int dim) {
  for (int r = 0; r < rows; ++r, to += to_row, from += from_row) {
    int x = 0;
    for (; x + LANES <= dim; x += LANES) store(to + x, widen(from + x));
    if (x < dim) {
      alignas(64) float last[LANES];
      store(last, widen_partial(from + x, dim - x));
      for (; x < dim; ++x) to[x] = last[x % LANES];
    }
    for (; x < to_row; ++x) to[x] = 0;
  }
  memset(to, 0, (padded_rows - rows) * to_row * sizeof(float));
}

// Asks for rows that will be packed soon: they are short and far apart, which hardware prefetchers do not follow.
template <class E>
inline void prefetch_rows(const E* from, int64_t from_row, int rows, int64_t dim) {
  for (int r = 0; r < rows; ++r)
    for (int64_t x = 0; x < dim; x += int64_t(LINE / sizeof(E))) ask_for_line(from + r * from_row + x);
}

// One step of a transpose: exchanges the off-diagonal blocks of STRIDE x STRIDE in every 2 STRIDE x 2 STRIDE.
template <int STRIDE>
inline void exchange(vint* rows) {
  vint low, high;
  for (int c = 0; c < LANES; ++c) {
    low[c] = c & STRIDE ? LANES + c - STRIDE : c;
    high[c] = c & STRIDE ? LANES + c : c + STRIDE;
  }
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) {
    if (r & STRIDE) continue;
    const vint a = rows[r], b = rows[r | STRIDE];
    rows[r] = shuffle(a, b, low);
    rows[r | STRIDE] = shuffle(a, b, high);
  }
}

inline void transpose_square(vint* rows) {
  if constexpr (LANES > 8) exchange<8>(rows);
  if constexpr (LANES > 4) exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

inline void transpose_block(uint32_t* to, int64_t to_row, const uint32_t* from, int64_t from_row) {
  vint rows[LANES];
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) rows[r] = load<vint>(from + r * from_row);
  transpose_square(rows);
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) store(to + r * to_row, rows[r]);
}

// to[x * to_row + r] = from[r * from_row + x], four-byte units.
inline void transpose_units(uint32_t* to, int64_t to_row, const uint32_t* from, int64_t from_row, int rows, int units) {
  for (int x0 = 0; x0 < units; x0 += LANES)
    for (int r0 = 0; r0 < rows; r0 += LANES) {
      if (x0 + LANES <= units && r0 + LANES <= rows) {
        transpose_block(to + x0 * to_row + r0, to_row, from + r0 * from_row + x0, from_row);
        continue;
      }
      for (int x = x0; x < x0 + LANES && x < units; ++x)
        for (int r = r0; r < r0 + LANES && r < rows; ++r) to[x * to_row + r] = from[r * from_row + x];
    }
}

template <class P>
struct Pack;

template <>
struct Pack<Float32> {
  // Rows as stored: to[r * to_row + x].
  template <class E>
  static void rows(float* to, int64_t to_row, const E* from, int64_t from_row, int count, int padded, int dim) {
    widen_rows(to, to_row, from, from_row, count, padded, dim);
  }
  // Units along the rows: one float is its own unit.
  template <class E>
  static void pairs(float* to, int64_t to_row, const E* from, int64_t from_row, int count, int padded, int dim) {
    widen_rows(to, to_row, from, from_row, count, padded, dim);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Pack<BFloat16> {
  // Rows as stored: unit x of row r holds elements 2x and 2x + 1.
  static void rows(uint32_t* to, int64_t to_row, const bf16* from, int64_t from_row, int count, int padded, int dim) {
    for (int r = 0; r < count; ++r, to += to_row, from += from_row) {
      int x = 0;
      for (; x + 2 * LANES <= dim; x += 2 * LANES) store(to + x / 2, load<vuint>((const uint32_t*)(from + x)));
      memcpy(to + x / 2, from + x, (dim - x) * sizeof(bf16));
      memset((char*)to + dim * sizeof(bf16), 0, to_row * sizeof(uint32_t) - dim * sizeof(bf16));
    }
    memset(to, 0, (padded - count) * to_row * sizeof(uint32_t));
  }
  // Units along the rows: unit x of row r / 2 holds element x of rows r and r + 1.
  static void pairs(uint32_t* to, int64_t to_row, const bf16* from, int64_t from_row, int count, int padded, int dim) {
    for (int r = 0; r < padded; r += 2, to += to_row) {
      const bf16* const both[2] = {from + r * from_row, from + (r + 1) * from_row};
      unit_row(to, to_row, both, count - r, dim);
    }
  }
  // One row of those, of `count` rows that lie anywhere.
  static void unit_row(uint32_t* to, int64_t to_row, const bf16* const* rows, int count, int dim) {
    const auto lanes = [](int64_t left, int most) { return left >= most ? ~0u >> (32 - most) : (1u << left) - 1; };
    const __m512i low = (__m512i)(vuint)(iota() | (iota() + 2 * LANES) << 16);  // words 0, 32, 1, 33, ...
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    for (int64_t x = 0; x < to_row; x += 2 * LANES) {
      const __mmask32 inside = x < dim ? lanes(dim - x, 2 * LANES) : 0;
      const __m512i first = _mm512_maskz_loadu_epi16(count >= 1 ? inside : 0, rows[0] + x);
      const __m512i second = _mm512_maskz_loadu_epi16(count >= 2 ? inside : 0, rows[1] + x);
      _mm512_mask_storeu_epi32(to + x, __mmask16(lanes(to_row - x, LANES)),
                               _mm512_permutex2var_epi16(first, low, second));
      if (x + LANES < to_row)
        _mm512_mask_storeu_epi32(to + x + LANES, __mmask16(lanes(to_row - x - LANES, LANES)),
                                 _mm512_permutex2var_epi16(first, high, second));
    }
  }
};
#endif

#if defined(DUPLEX_MATRIX_UNIT)
template <>
struct Pack<MatrixBFloat16> : Pack<BFloat16> {};
#endif

#if defined(__AVX512BF16__)
// Two vectors of floats as bfloat16 pairs, one pair a lane.
inline void store_pairs(uint32_t* to, vfloat low, vfloat high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const vuint order = (vuint)(iota() | (iota() + LANES) << 16);
  store(to, (vuint)_mm512_permutexvar_epi16((__m512i)order, both));
}
#endif

// The transpose of `rows`: to[x * to_row + r] for every unit x of the (padded) dimension. scratch: padded * units.
template <class P, class E>
inline void pack_transposed(typename P::unit* to, int64_t to_row, const E* from, int64_t from_row, int count,
                            int padded, int dim, int units, typename P::unit* scratch) {
  Pack<P>::rows(scratch, units, from, from_row, count, padded, dim);
  transpose_units((uint32_t*)to, to_row, (const uint32_t*)scratch, units, padded, units);
}

}  // namespace duplex::DUPLEX_ISA
