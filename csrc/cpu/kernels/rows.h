// Products of a few queries with stored rows of keys and values, one row after the other, or as many at once as
// widening and adding up need: hardware prefetchers follow that best, so that reading hides what is computed meanwhile.
// With more rows by turns, a part of each, reading and computing take their time one after the other.
//
// Each line asks for the one at the same place of a later row. More at once would fill the queue of misses, and the
// products' own loads wait behind them. A request that finds no place in the queue is lost, so every pass over the same
// rows asks again.
#pragma once

#include "cpu/kernels/keys.h"
#include "cpu/kernels/tile.h"

namespace duplex::DUPLEX_ISA {

constexpr int BLOCK = 64;  // keys whose weights are found at once

// Whether stored numbers are multiplied as they lie, without being widened.
template <class P, class S>
constexpr bool AS_STORED = sizeof(S) * P::STEP == sizeof(typename P::unit);

// Queries of a head that are computed at once; with more, products are waited for instead of memory.
constexpr int FEW = 4;

constexpr int MOST_AHEAD = BLOCK / 2;  // rows that are known behind a block

// Rows between what is computed and what is asked for: far enough for memory, within the nearest cache, and more than
// are added up at once.
template <class S>
inline int rows_ahead(int64_t numbers_in_row, int64_t queries) {
  constexpr int64_t BYTES = QUANTISED<S> ? 16384 : 8192;
  return int(clamp(BYTES / (numbers_in_row * int64_t(sizeof(S))), queries <= FEW ? 5 : 8, MOST_AHEAD));
}

// Where heads lie in a row.
struct Heads {
  int64_t count, first, stride;
  int64_t at(int64_t h) const { return first + h * stride; }
};

// Asks for SIZE bytes from byte `at` of a head on.
template <int SIZE>
inline void ask_for(const void* head, int64_t at) {
  if constexpr (SIZE < LINE) {
    if (at % LINE == 0) ask_for_line((const char*)head + at);
  } else {
    for (int n = 0; n < SIZE; n += LINE) ask_for_line((const char*)head + at + n);
  }
}

// A vector of the product's units from stored elements.
template <class P, class S>
struct Units {
  static typename P::vector load(const S* from) { return widen(from); }
};
#if defined(__AVX512BF16__)
template <>
struct Units<BFloat16, bf16> {
  static vuint load(const bf16* from) { return DUPLEX_ISA::load<vuint>((const uint32_t*)from); }
};
inline vuint bf16_pairs(vfloat low, vfloat high) {
  return (vuint)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
// float8_e4m3fn as bfloat16, by magnitude: a table costs fewer instructions than the arithmetic and knows the NaN.
struct Float8Table {
  alignas(64) uint16_t bits[128];

  constexpr Float8Table() : bits{} {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0) {  // mantissa * 2^-9: shifted until its leading bit is implied
        if (mantissa == 0) continue;
        for (exponent = 1; mantissa < 8; mantissa <<= 1) --exponent;
        mantissa &= 7;
      }
      bits[code] = code == 127 ? 0x7fc0 : uint16_t((exponent - 7 + 127) << 7 | mantissa << 4);
    }
    bits[0] = 0;
  }
};
constexpr Float8Table FLOAT8;

template <>
struct Units<BFloat16, f8> {
  static vuint load(const f8* from) {
    const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const auto part = [](int n) { return _mm512_load_si512(FLOAT8.bits + 32 * n); };
    const __m512i low = _mm512_permutex2var_epi16(part(0), codes, part(1));
    const __mmask32 is_high = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __m512i value = _mm512_mask_mov_epi16(low, is_high, _mm512_permutex2var_epi16(part(2), codes, part(3)));
    return (vuint)_mm512_ternarylogic_epi32(value, codes, _mm512_set1_epi16(short(0x8000)),
                                            0xf8);  // value | codes & sign
  }
};
#endif

// Halves the number of lanes that one sum is spread over: afterwards lanes with bit STRIDE hold b's.
template <int STRIDE>
inline vfloat fold(vfloat a, vfloat b) {
  vint low, high;
  for (int c = 0; c < LANES; ++c) {
    low[c] = c & STRIDE ? LANES + c - STRIDE : c;
    high[c] = c & STRIDE ? LANES + c : c + STRIDE;
  }
  return (vfloat)shuffle((vint)a, (vint)b, low) + (vfloat)shuffle((vint)a, (vint)b, high);
}
template <int STRIDE>
[[gnu::always_inline]] inline void fold_all(vfloat* v) {
#pragma GCC unroll 8
  for (int n = 0; n < STRIDE; ++n) v[n] = fold<STRIDE>(v[n], v[n + STRIDE]);
  if constexpr (STRIDE > 1) fold_all<STRIDE / 2>(v);
}

// Calls act.template operator()<Q>(m) for queries m to m + Q that together are all of `count`.
template <class Act>
inline void in_fours(int64_t count, const Act& act) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) act.template operator()<4>(m);
  for (; m + 2 <= count; m += 2) act.template operator()<2>(m);
  for (; m < count; ++m) act.template operator()<1>(m);
}

// sum[q * ROWS + r] = <q, k_r>, spread over lanes, for a head of Q queries and ROWS rows.
template <class P, class S, int Q, int ROWS>
[[gnu::always_inline]] inline void multiply_rows(const typename P::unit* queries, int64_t units, const S* const* rows,
                                                 const S* const* soon, int64_t head, vfloat* sum) {
  const S *row[ROWS], *later[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    row[r] = rows[r] + head;
    later[r] = soon[r] + head;
  }
#pragma GCC unroll 16
  for (int c = 0; c < Q * ROWS; ++c) sum[c] = vfloat{};
#pragma GCC unroll 1
  for (int64_t x = 0; x < units; x += LANES) {
    typename P::vector key[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      key[r] = Units<P, S>::load(row[r] + x * P::STEP);
      ask_for<LANES * P::STEP * sizeof(S)>(later[r], x * P::STEP * sizeof(S));
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const auto one = load<typename P::vector>(queries + q * units + x);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sum[q * ROWS + r] = P::multiply_add(sum[q * ROWS + r], one, key[r]);
    }
  }
}

// scores[(h * Q + q) * BLOCK + n] = <q, k_n> for the Q queries of each head and every row: LANES products, each spread
// over a vector of its own until the end. products: as many numbers as there are scores, and LANES more.
template <class P, class S, int Q>
[[gnu::noinline]] void dot_few(const typename P::unit* queries, int64_t units, Heads heads, const S* const* rows,
                               const S* const* soon, int keys, float* products, float* scores) {
  constexpr int ROWS = AS_STORED<P, S> ? 1 : LANES / Q < 4 ? LANES / Q : 4;  // widening costs more than reading
  alignas(64) float spread[LANES][LANES];
  int filled = 0;
  float* done = products;
  const auto finish = [&] {
    vfloat sum[LANES];
#pragma GCC unroll 16
    for (int c = 0; c < LANES; ++c) sum[c] = load<vfloat>(spread[c]);
    fold_all<LANES / 2>(sum);
    store(done, sum[0]);
    done += filled;
    filled = 0;
  };
  for (int n = 0; n < keys; n += ROWS)
    for (int64_t h = 0; h < heads.count; ++h) {
      vfloat sum[Q * ROWS];
      multiply_rows<P, S, Q, ROWS>(queries + h * Q * units, units, rows + n, soon + n, heads.at(h), sum);
#pragma GCC unroll 16
      for (int c = 0; c < Q * ROWS; ++c) store(spread[filled + c], sum[c]);
      if ((filled += Q * ROWS) == LANES) finish();
    }
  if (filled) finish();
  for (int64_t m = 0; m < heads.count * Q; ++m)
    for (int n = 0; n < keys; n += ROWS)
      memcpy(scores + m * BLOCK + n, products + n * heads.count * Q + m * ROWS, ROWS * sizeof(float));
}

// The same of any number of queries, in tiles that registers hold: rows are read again for each four, while they are
// near.
template <class P, class S>
[[gnu::noinline]] void dot_many(const typename P::unit* queries, int64_t count, int64_t units, Heads heads,
                                const S* const* rows, const S* const* soon, int keys, float* scores) {
  constexpr int NEAR = 4;  // rows
  for (int n0 = 0; n0 < keys; n0 += NEAR)
    for (int64_t h = 0; h < heads.count; ++h)
      in_fours(count, [&]<int Q>(int64_t m) {
        constexpr int ROWS = LANES / Q;
        if (n0 % ROWS != 0 && ROWS > NEAR) return;
        const int64_t first = h * count + m;
        for (int n = n0; n < n0 + NEAR; n += ROWS) {
          vfloat sum[LANES];
          multiply_rows<P, S, Q, ROWS>(queries + first * units, units, rows + n, soon + n, heads.at(h), sum);
          fold_all<LANES / 2>(sum);
          alignas(64) float products[LANES];
          store(products, sum[0]);
          for (int q = 0; q < Q; ++q)
            memcpy(scores + (first + q) * BLOCK + n, products + q * ROWS, ROWS * sizeof(float));
        }
      });
}

// 2 * LANES columns of P::STEP rows as two vectors of the product's units.
template <class P, class S>
struct Values {
  static void load(typename P::vector* to, const S* const* rows, int64_t x) {
    to[0] = widen(rows[0] + x);
    to[1] = widen(rows[0] + x + LANES);
  }
  static int64_t place(int64_t x) { return x; }  // of column x in the sums
};
#if defined(__AVX512BF16__)
// Rows are interleaved within 128 bits.
template <class S>
struct Values<BFloat16, S> {
  static void load(vuint* to, const S* const* rows, int64_t x) {
    const __m512i first = (__m512i)Units<BFloat16, S>::load(rows[0] + x);
    const __m512i second = (__m512i)Units<BFloat16, S>::load(rows[1] + x);
    to[0] = (vuint)_mm512_unpacklo_epi16(first, second);
    to[1] = (vuint)_mm512_unpackhi_epi16(first, second);
  }
  static int64_t place(int64_t x) { return x / 32 * 32 + x % 8 / 4 * 16 + x % 32 / 8 * 4 + x % 4; }
};
#endif

// out[q * dims + x] = factor[q] * out + sum over ROWS rows of weights[q * BLOCK + n] * v_n[x], for a head of Q queries;
// CHUNKS: of columns at once.
template <class P, class S, int Q, int ROWS, int CHUNKS>
[[gnu::noinline]] void add_rows(const typename P::unit* weights, const S* const* rows, const S* const* soon,
                                int64_t head, int64_t dims, float* out, const float* factor) {
  constexpr int WIDE = 2 * CHUNKS;
  const S *row[ROWS], *later[ROWS];
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n) {
    row[n] = rows[n] + head;
    later[n] = soon[n] + head;
  }
#pragma GCC unroll 1
  for (int64_t x = 0; x < dims; x += WIDE * LANES) {
    vfloat sum[Q][WIDE];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sum[q][w] = load<vfloat>(out + q * dims + x + w * LANES) * factor[q];
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; n += P::STEP) {
      typename P::vector value[WIDE];
#pragma GCC unroll 2
      for (int c = 0; c < CHUNKS; ++c) {
        const int64_t at = x + c * 2 * LANES;
        Values<P, S>::load(value + 2 * c, row + n, at);
#pragma GCC unroll 2
        for (int r = n; r < n + P::STEP; ++r) ask_for<2 * LANES * sizeof(S)>(later[r], at * sizeof(S));
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const auto weight = P::splat_unit(weights[q * BLOCK + n / P::STEP]);
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) sum[q][w] = P::multiply_add(sum[q][w], weight, value[w]);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) store(out + q * dims + x + w * LANES, sum[q][w]);
  }
}

// Scores of a block of keys, [head][query][BLOCK]; past the last key they are junk.
template <class P, class S>
void dot_block(const typename P::unit* queries, Heads heads, int64_t count, int64_t units, const S* const* rows,
               const S* const* soon, int keys, float* products, float* scores) {
  const auto few = [&]<int Q>() { dot_few<P, S, Q>(queries, units, heads, rows, soon, keys, products, scores); };
  if (count == 1) return few.template operator()<1>();
  if (count == 2) return few.template operator()<2>();
  if constexpr (AS_STORED<P, S>)  // else sums of a head fill the registers and need not wait for those of others
    if (count == 4) return few.template operator()<4>();
  dot_many<P, S>(queries, count, units, heads, rows, soon, keys, scores);
}

// Adds a block of values to the sums of every query, [head][query][dims], which its factor scales before.
template <class P, class S>
void add_block(const typename P::unit* weights, Heads heads, int64_t count, const S* const* rows, const S* const* soon,
               int keys, int64_t dims, float* out, const float* factor) {
  static constexpr float ones[4] = {1, 1, 1, 1};
  const auto add = [&]<int ROWS, int CHUNKS>() {
    for (int n = 0; n < keys; n += ROWS)
      for (int64_t h = 0; h < heads.count; ++h)
        in_fours(count, [&]<int Q>(int64_t m) {
          const int64_t at = h * count + m;
          add_rows<P, S, Q, ROWS, CHUNKS>(weights + at * BLOCK + n / P::STEP, rows + n, soon + n, heads.at(h), dims,
                                          out + at * dims, n == 0 ? factor + at : ones);
        });
  };
  const bool wide = dims % (4 * LANES) == 0;
  if (QUANTISED<S> || count > FEW) return wide ? add.template operator()<8, 2>() : add.template operator()<8, 1>();
  if constexpr (AS_STORED<P, S>)
    if (count > 1 && wide) return add.template operator()<8 / sizeof(S), 2>();
  add.template operator()<4, 1>();
}

}  // namespace duplex::DUPLEX_ISA
