// Products of int8 with numbers that are made whole ones: as bytes they are multiplied four at a time and need no
// conversion. What they meet is a multiple of a unit, in three bytes (queries) or two (weights), so near that it is far
// below a rounding of bfloat16: error at most 2^-24 of the largest of a query, 2^-16 of the largest weight of a block.
#pragma once

#include "cpu/kernels/rows.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)

namespace duplex::DUPLEX_ISA {

// sum[i] + the products of four bytes each, unsigned ones with signed ones.
inline __m512i dot_four(__m512i sum, __m512i without_sign, __m512i with_sign) {
  return _mm512_dpbusd_epi32(sum, without_sign, with_sign);
}
inline vfloat as_floats(__m512i x) { return (vfloat)_mm512_cvtepi32_ps(x); }

// Bytes of a row from x on, 0 past its end.
inline __m512i load_bytes(const int8_t* row, int64_t x, int64_t dims) {
  return dims - x >= 64 ? _mm512_loadu_si512(row + x) : _mm512_maskz_loadu_epi8((1ull << (dims - x)) - 1, row + x);
}

// So that the largest of some numbers is `most` units; it and what one is worth are normal numbers.
inline float units_in_one(float most, float largest) {
  const float units = most / largest;
  return units < 0x1p126f ? units : 0x1p126f;
}

// A query as three rows of `width` bytes, highest first: round(x / unit) + 2^23. Returns its unit; NaN makes it NaN.
inline float pack_whole(uint8_t* to, int64_t width, const bf16* from, int64_t dims) {
  constexpr float LARGEST = 8388600.0f;  // below 2^23, whatever is rounded
  vfloat most{};
  bool is_nan = false;
  for (int64_t x = 0; x < dims; x += LANES) {
    const vfloat value = widen(from + x);
    is_nan |= any(value != value);
    most = max(abs(value), most);
  }
  const float per_unit = units_in_one(LARGEST, _mm512_reduce_max_ps((__m512)most));
  for (int64_t x = 0; x < width; x += LANES) {
    const vfloat value = x < dims ? widen(from + x) * per_unit : vfloat{};
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)value), _mm512_set1_epi32(1 << 23));
    for (int n = 0; n < 3; ++n)
      _mm_storeu_si128((__m128i*)(to + n * width + x), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 16 - 8 * n)));
  }
  return is_nan ? __builtin_nanf("") : 1 / per_unit;
}

// scores[(h * queries_a_kv + q) * BLOCK + n] = <q, k_n> for H kv heads, Q queries of each and 16 / (H * Q) keys.
template <int H, int Q>
void dot_bytes(const uint8_t* queries, const float* units, int64_t queries_a_kv, int64_t width, int64_t dims,
               const int8_t* const* rows, int64_t head_stride, float* scores) {
  constexpr int GROUP = LANES / (H * Q);
  const __m512i ones = _mm512_set1_epi8(1);
  vfloat sum[LANES];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h)
#pragma GCC unroll 16
    for (int g = 0; g < GROUP; ++g) {
      __m512i all{}, part[Q][3] = {};
      for (int64_t x = 0; x < width; x += 64) {
        const __m512i key = load_bytes(rows[g] + h * head_stride, x, dims);
        all = dot_four(all, ones, key);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 3
          for (int n = 0; n < 3; ++n)
            part[q][n] =
                dot_four(part[q][n], _mm512_loadu_si512(queries + ((h * queries_a_kv + q) * 3 + n) * width + x), key);
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const __m512i high = _mm512_sub_epi32(part[q][0], _mm512_slli_epi32(all, 7));
        const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(part[q][1], 8), part[q][2]);
        sum[(h * Q + q) * GROUP + g] = (as_floats(high) * 65536.0f + as_floats(low)) * units[h * queries_a_kv + q];
      }
    }
  fold_all<LANES / 2>(sum);
  alignas(64) float products[LANES];
  store(products, sum[0]);
  for (int h = 0; h < H; ++h)
    for (int q = 0; q < Q; ++q)
      memcpy(scores + (h * queries_a_kv + q) * BLOCK, products + (h * Q + q) * GROUP, GROUP * sizeof(float));
}

// A row of 64 weights in its own place: their high bytes, their low bytes, their unit. round(w / unit) + 2^15.
constexpr int HIGH = 0, LOW = 16, UNIT = 32;  // in units of four bytes
inline void whole_weights(float* row) {
  constexpr float LARGEST = 32767.0f;
  vfloat weight[4], most{};
  for (int n = 0; n < 4; ++n) {
    weight[n] = load<vfloat>(row + n * LANES);
    most = max(abs(weight[n]), most);
  }
  const float per_unit = units_in_one(LARGEST, _mm512_reduce_max_ps((__m512)most));
  for (int n = 0; n < 4; ++n) {
    const __m512i whole =
        _mm512_add_epi32(_mm512_cvtps_epi32((__m512)(weight[n] * per_unit)), _mm512_set1_epi32(1 << 15));
    _mm_storeu_si128((__m128i*)(row + HIGH) + n, _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
    _mm_storeu_si128((__m128i*)(row + LOW) + n, _mm512_cvtepi32_epi8(whole));
  }
  row[UNIT] = 1 / per_unit;
}

// Of bytes x to x + 64 of four rows those that one half of unpacking gives, as two vectors, of one column in each four.
template <int HALF>
struct Columns {
  __m512i at[2];

  Columns(const int8_t* const* rows, int64_t offset, int64_t x, int64_t dims) {
    const auto pair = [&](int n) {
      const __m512i a = load_bytes(rows[n] + offset, x, dims), b = load_bytes(rows[n + 1] + offset, x, dims);
      return HALF ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
    };
    const __m512i first = pair(0), second = pair(2);
    at[0] = _mm512_unpacklo_epi16(first, second);
    at[1] = _mm512_unpackhi_epi16(first, second);
  }
};

// Where element x of a row of sums lies by that order.
inline int64_t place_of_byte(int64_t x) { return x / 64 * 64 + x % 16 / 4 * 16 + x % 64 / 16 * 4 + x % 4; }

// out[q * width + x] = factor[q] * out + sum over ROWS keys, from key n of the weights on, of weights[q] * v[x].
template <int ROWS, int Q>
void add_values(const float* weights, int n, const int8_t* const* rows, int64_t offset, int64_t width, int64_t dims,
                float* out, const float* factor) {
  const __m512i ones = _mm512_set1_epi8(1);
  const auto half = [&]<int HALF>(int64_t x) {
    __m512i all[2] = {}, high[Q][2] = {}, low[Q][2] = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r += 4) {
      const Columns<HALF> value(rows + r, offset, x, dims);
      for (int w = 0; w < 2; ++w) all[w] = dot_four(all[w], ones, value.at[w]);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const auto four = [&](int place) {
          int bytes;
          memcpy(&bytes, weights + q * BLOCK + place + (n + r) / 4, 4);
          return _mm512_set1_epi32(bytes);
        };
        const __m512i of_high = four(HIGH), of_low = four(LOW);
        for (int w = 0; w < 2; ++w) {
          high[q][w] = dot_four(high[q][w], of_high, value.at[w]);
          low[q][w] = dot_four(low[q][w], of_low, value.at[w]);
        }
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
      for (int w = 0; w < 2; ++w) {
        const __m512i signed_high = _mm512_sub_epi32(high[q][w], _mm512_slli_epi32(all[w], 7));
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(signed_high, 8), low[q][w]);
        float* at = out + q * width + x + (2 * HALF + w) * LANES;
        store(at, load<vfloat>(at) * factor[q] + as_floats(whole) * weights[q * BLOCK + UNIT]);
      }
  };
  for (int64_t x = 0; x < width; x += 64) {
    half.template operator()<0>(x);
    half.template operator()<1>(x);
  }
}

// Scores of every query with a block of keys, four of all heads at a time; past the last key they are junk.
inline void dot_block_of_bytes(const uint8_t* queries, const float* units, int64_t heads, int64_t count, int64_t dims,
                               const int8_t* const* rows, const int8_t* const* soon, int64_t head_stride, int keys,
                               float* scores) {
  const int64_t width = round_up(dims, 64);
  const auto some = [&]<int H, int Q>(int64_t kv, int64_t m, int n) {
    constexpr int GROUP = LANES / (H * Q);
    const int8_t* at[GROUP];
    for (int g = 0; g < GROUP; ++g) at[g] = rows[n + g] + kv * head_stride;
    const int64_t first = kv * count + m;
    dot_bytes<H, Q>(queries + first * 3 * width, units + first, count, width, dims, at, head_stride,
                    scores + first * BLOCK + n);
  };
  constexpr int AT_ONCE = 4;
  for (int n0 = 0; n0 < keys; n0 += AT_ONCE)
    for (int64_t kv = 0, step; kv < heads; kv += step) {
      // Queries of several heads fill a vector where those of one do not.
      step = count == 1 && kv + 4 <= heads ? 4 : count == 2 && kv + 2 <= heads ? 2 : 1;
      for (int64_t h = kv; h < kv + step; ++h)
        for (int n = n0; n < n0 + AT_ONCE; ++n) prefetch_rows(soon[n] + h * head_stride, 0, 1, dims);
      if (step == 4) {
        some.template operator()<4, 1>(kv, 0, n0);
      } else if (step == 2) {
        some.template operator()<2, 2>(kv, 0, n0);
      } else {
        in_fours(count, [&]<int Q>(int64_t m) {
          constexpr int GROUP = LANES / Q;
          if (GROUP <= AT_ONCE)
            for (int n = n0; n < n0 + AT_ONCE; n += GROUP) some.template operator()<1, Q>(kv, m, n);
          else if (n0 % GROUP == 0)
            some.template operator()<1, Q>(kv, m, n0);
        });
      }
    }
}

// Adds a block of values to the sums of every query, which its factor scales before.
inline void add_block_of_bytes(const float* weights, int64_t heads, int64_t count, const int8_t* const* rows,
                               const int8_t* const* soon, int64_t head_stride, int keys, int64_t dims, float* out,
                               const float* factor) {
  constexpr int AT_ONCE = 8;
  const int64_t width = round_up(dims, 64);
  for (int n = 0; n < keys; n += AT_ONCE)
    for (int64_t kv = 0; kv < heads; ++kv) {
      for (int r = n; r < n + AT_ONCE; ++r) prefetch_rows(soon[r] + kv * head_stride, 0, 1, dims);
      in_fours(count, [&]<int Q>(int64_t m) {
        static constexpr float ones[4] = {1, 1, 1, 1};
        const int64_t at = kv * count + m;
        add_values<AT_ONCE, Q>(weights + at * BLOCK, n, rows + n, kv * head_stride, width, dims, out + at * width,
                               n == 0 ? factor + at : ones);
      });
    }
}

}  // namespace duplex::DUPLEX_ISA

#endif
