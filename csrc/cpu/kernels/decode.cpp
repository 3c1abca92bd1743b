// Attention of a few queries over pages: bound by reading the cache, so a task reads each block of keys, then of
// values, once, a few rows at a time with all of their heads, in the order in which they lie in memory. That is what
// hardware prefetchers follow.
//
// Vectors lie along the head_dim for <q, k> and for the output, along the keys for the softmax between them.
#include "cpu/kernels/bytes.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/union.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int ROWS_AT_MOST = 12;  // from about there on the forward kernel's tiles of queries cost less
constexpr int BLOCK = 64;         // keys
constexpr int MOST_VALUES = 8;    // rows of values that are added up at once
constexpr int LINE = 64;          // bytes that memory brings at once
static_assert(BLOCK % (2 * LANES) == 0 && BLOCK % MOST_VALUES == 0);

// Rows between what is computed and what is asked for: enough for memory, within L1.
template <class S>
constexpr int AHEAD = QUANTISED<S> ? 16 : 8;

// Whether stored numbers are multiplied as bytes.
template <class P, class S>
constexpr bool BYTES = false;
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
template <>
constexpr bool BYTES<BFloat16, int8_t> = true;
static_assert(BLOCK == 64);
#endif

// Asks for what a head that comes soon has where SIZE bytes of one, from byte `at` on, are computed. One line between
// two products overlaps with them; a burst fills the queue of misses, and the products wait behind it.
template <int SIZE>
inline void ask_for(const void* soon, int64_t at) {
  if (SIZE >= LINE || at % LINE == 0) __builtin_prefetch((const char*)soon + at);
}

// Heads of rows that come soon, as many as are computed. Where several queries of a head are, those in the order of
// memory, whatever that of the products, so that hardware prefetchers help; else those at the same places.
template <class S>
struct Ahead {
  const S* const* rows;
  int64_t count, heads, stride;
  bool in_order;
  int64_t row = 0, head = 0;

  Ahead(const S* const* rows, int64_t count, int64_t heads, int64_t stride, int64_t queries)
      : rows(rows), count(count), heads(heads), stride(stride), in_order(!QUANTISED<S> && queries > 1) {}

  // For products of H heads from kv on, of ROWS rows from the n-th on.
  template <int H, int ROWS>
  void take(const S** to, int64_t n, int64_t kv) {
    if (!in_order) {
      for (int h = 0; h < H; ++h)
        for (int r = 0; r < ROWS; ++r) to[h * ROWS + r] = rows[n + r] + (kv + h) * stride;
      return;
    }
    for (int c = 0; c < H * ROWS; ++c) {
      to[c] = rows[row] + head * stride;
      if (++head < heads) continue;
      head = 0;
      if (row + 1 < count) ++row;
    }
  }
};

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
inline void fold_all(vfloat* v) {
#pragma GCC unroll 8
  for (int n = 0; n < STRIDE; ++n) v[n] = fold<STRIDE>(v[n], v[n + STRIDE]);
  if constexpr (STRIDE > 1) fold_all<STRIDE / 2>(v);
}

// Every lane becomes the largest, or the sum, of all; Q vectors at once hide each other's latency.
template <int STRIDE, int Q, class Combine>
inline void across_lanes(vfloat (&v)[Q], const Combine& combine) {
  vint other;
  for (int c = 0; c < LANES; ++c) other[c] = c ^ STRIDE;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) v[q] = combine(v[q], (vfloat)shuffle((vint)v[q], (vint)v[q], other));
  if constexpr (STRIDE > 1) across_lanes<STRIDE / 2>(v, combine);
}

// scores[(h * queries + q) * BLOCK + n] = <q, k_n> for H kv heads, Q queries of each and GROUP keys: LANES products,
// each summed over a vector of its own until the end. Asks for as many heads at `soon`.
template <class P, class S, int H, int Q>
void dot_keys(const typename P::unit* queries, int64_t queries_a_kv, int64_t units, const S* const* rows,
              const S* const* soon, int64_t head_stride, float* scores) {
  constexpr int GROUP = LANES / (H * Q);
  vfloat sum[LANES] = {};
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    const auto* query = queries + h * queries_a_kv * units;
    for (int64_t x = 0; x < units; x += LANES) {
      typename P::vector key[GROUP];
#pragma GCC unroll 16
      for (int g = 0; g < GROUP; ++g) {
        key[g] = Units<P, S>::load(rows[g] + h * head_stride + x * P::STEP);
        ask_for<LANES * P::STEP * sizeof(S)>(soon[h * GROUP + g], x * P::STEP * sizeof(S));
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const auto one = load<typename P::vector>(query + q * units + x);
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; ++g) {
          vfloat& to = sum[(h * Q + q) * GROUP + g];
          to = P::multiply_add(to, one, key[g]);
        }
      }
    }
  }
  fold_all<LANES / 2>(sum);
  alignas(64) float products[LANES];
  store(products, sum[0]);
  for (int h = 0; h < H; ++h)
    for (int q = 0; q < Q; ++q)
      memcpy(scores + (h * queries_a_kv + q) * BLOCK, products + (h * Q + q) * GROUP, GROUP * sizeof(float));
}

// out[q * dims + x] = factor[q] * out + sum over ROWS keys of weights[q][n] * v_n[x]. Asks for as many heads at `soon`.
template <class P, class S, int Q, int ROWS>
struct Accumulate {
  static void run(const typename P::unit* weights, const S* const* rows, const S* const* soon, int64_t offset,
                  int64_t dims, float* out, const float* factor) {
    constexpr int WIDE = 4;
    int64_t x = 0;
    for (; x + WIDE * LANES <= dims; x += WIDE * LANES) part<WIDE>(weights, rows, soon, offset, dims, out, factor, x);
    for (; x < dims; x += LANES) part<1>(weights, rows, soon, offset, dims, out, factor, x);
  }
  template <int WIDE>
  static void part(const float* weights, const S* const* rows, const S* const* soon, int64_t offset, int64_t dims,
                   float* out, const float* factor, int64_t x) {
    vfloat sum[Q][WIDE];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sum[q][w] = load<vfloat>(out + q * dims + x + w * LANES) * factor[q];
    for (int n = 0; n < ROWS; ++n) {
      const S* from = rows[n] + offset + x;
      vfloat value[WIDE];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) {
        value[w] = widen(from + w * LANES);
        ask_for<LANES * sizeof(S)>(soon[n], (x + w * LANES) * sizeof(S));
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const vfloat weight = splat(weights[q * BLOCK + n]);
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) sum[q][w] += weight * value[w];
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) store(out + q * dims + x + w * LANES, sum[q][w]);
  }
};

#if defined(__AVX512BF16__)
// Neighbouring keys are one unit: their rows are interleaved within 128 bits, which orders the accumulator as `place`
// says.
template <class S, int Q, int ROWS>
struct Accumulate<BFloat16, S, Q, ROWS> {
  static void run(const uint32_t* pairs, const S* const* rows, const S* const* soon, int64_t offset, int64_t dims,
                  float* out, const float* factor) {
    int64_t x = 0;
    for (; x + 4 * LANES <= dims; x += 4 * LANES) part<2>(pairs, rows, soon, offset, dims, out, factor, x);
    for (; x < dims; x += 2 * LANES) part<1>(pairs, rows, soon, offset, dims, out, factor, x);
  }
  template <int CHUNKS>
  static void part(const uint32_t* pairs, const S* const* rows, const S* const* soon, int64_t offset, int64_t dims,
                   float* out, const float* factor, int64_t x) {
    constexpr int WIDE = 2 * CHUNKS;
    vfloat sum[Q][WIDE];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sum[q][w] = load<vfloat>(out + q * dims + x + w * LANES) * factor[q];
    for (int n = 0; n < ROWS; n += 2) {
      vuint value[WIDE];
#pragma GCC unroll 2
      for (int c = 0; c < CHUNKS; ++c) {
        const int64_t at = x + c * 2 * LANES;
        const __m512i first = (__m512i)Units<BFloat16, S>::load(rows[n] + offset + at);
        const __m512i second = (__m512i)Units<BFloat16, S>::load(rows[n + 1] + offset + at);
        for (int r = n; r < n + 2; ++r) ask_for<2 * LANES * sizeof(S)>(soon[r], at * sizeof(S));
        value[2 * c] = (vuint)_mm512_unpacklo_epi16(first, second);
        value[2 * c + 1] = (vuint)_mm512_unpackhi_epi16(first, second);
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const vuint weight = BFloat16::splat_unit(pairs[q * BLOCK + n / 2]);
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) sum[q][w] = BFloat16::multiply_add(sum[q][w], weight, value[w]);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) store(out + q * dims + x + w * LANES, sum[q][w]);
  }
};
#endif

// Where element x of the output lies in the accumulator.
template <class P, class S>
inline int64_t place(int64_t x) {
#if defined(__AVX512BF16__)
  if constexpr (BYTES<P, S>) return place_of_byte(x);
  if constexpr (P::STEP == 2) return x / 32 * 32 + x % 8 / 4 * 16 + x % 32 / 8 * 4 + x % 4;
#endif
  return x;
}

template <class P>
struct DecodeScratch {
  Carver carver;
  typename P::unit* queries;            // [kv head][query][units]
  float *units, *out;                   // [kv head][query] ([dims])
  float *peak, *total, *factor;         // [kv head][query]
  float *scores, *k_scales, *v_scales;  // [kv head][query][BLOCK], [kv head][BLOCK]

  DecodeScratch(const Problem& p, int64_t queries_a_kv, void* base) : carver{(char*)base} {
    const int64_t count = p.heads_kv * queries_a_kv;
    queries = carver.take<typename P::unit>(count * round_up(p.head_dim, 64));
    units = carver.take<float>(count);
    out = carver.take<float>(count * round_up(p.head_dim_v, 64));
    peak = carver.take<float>(count);
    total = carver.take<float>(count);
    factor = carver.take<float>(count);
    scores = carver.take<float>(count * BLOCK);
    k_scales = carver.take<float>(p.heads_kv * BLOCK);
    v_scales = carver.take<float>(p.heads_kv * BLOCK);
  }
};

float bias_at(const BiasView& v, const HeadScores& head, int64_t i, int64_t j) {
  const int64_t at = head.b * v.batch + head.h * v.head + i * v.row + j * v.col;
  const auto one = [](const auto* from) {
    alignas(64) float wide[LANES];
    store(wide, widen_partial(from, 1));
    return wide[0];
  };
  switch (v.dtype) {
    case DType::FLOAT32: return ((const float*)v.data)[at];
    case DType::FLOAT16: return one((const f16*)v.data + at);
    case DType::BFLOAT16: return one((const bf16*)v.data + at);
    case DType::BOOL: return ((const uint8_t*)v.data)[at] ? 0.0f : -INF;
  }
  return 0;
}

// Everything between the products and the exponential for one query, on keys j0 .. j0 + keys; -inf where hidden.
void finish_scores(const HeadScores& head, int64_t i, int64_t j0, int keys, float* scores, const float* k_scales) {
  const Problem& p = head.problem;
  const Span& span = head.seq.span;
  for (int n = 0; n < keys; n += LANES) {
    vfloat s = load<vfloat>(scores + n);
    if (k_scales) s *= load<vfloat>(k_scales + n);
    if (!head.is_scaled_product()) {
      s *= p.scale;
      if (p.softcap > 0) s = tanh(s * (1.0f / p.softcap)) * p.softcap;
    }
    store(scores + n, s);
  }
  if (head.has_distance())
    for (int n = 0; n < keys; ++n) scores[n] += head.distance_term(j0 + n - (i + span.offset));
  if (p.bias)
    for (int n = 0; n < keys; ++n) scores[n] += bias_at(p.bias, head, i, j0 + n);
  const int64_t nearest = j0 - (i + span.offset);
  if (const RowTable& table = p.row_distance_bias)
    with_row(table, head.b, head.h, i, [&](const auto* row) { add_distances(scores, table, row, nearest, keys); });
  if (const RowTable& table = p.col_distance_bias)
    for (int n = 0; n < keys; ++n)
      with_row(table, head.b, head.h, j0 + n,
               [&](const auto* row) { add_distances(scores + n, table, row, nearest + n, 1); });
  if (span.cover(i, i + 1, j0, j0 + keys) != Cover::ALL)
    for (int n = 0; n < keys; ++n)
      if (!span.sees(i, j0 + n)) scores[n] = -INF;
}

// Weights of keys n to n + 2 * LANES of a row of BLOCK units.
template <class P, class S>
inline void store_weights(float* row, int n, vfloat first, vfloat second) {
#if defined(__AVX512BF16__)
  if constexpr (P::STEP == 2 && !BYTES<P, S>) return store((uint32_t*)row + n / 2, bf16_pairs(first, second));
#endif
  store(row + n, first);
  store(row + n + LANES, second);
}

// Exponentials of Q queries against their running peaks, as units of the product in the scores' place; weights past the
// last key are 0. `factor` is for the old sums.
template <class P, class S, int Q>
void softmax_rows(float unit, int keys, float* scores, float* peak, float* total, const float* v_scales,
                  float* factor) {
  const int padded = int(round_up(keys, 2 * LANES));  // a vector of pairs of keys
  vfloat top[Q], sum[Q], base[Q];
  for (int q = 0; q < Q; ++q) {
    float* row = scores + q * BLOCK;
    for (int n = keys; n < padded; ++n) row[n] = -INF;
    top[q] = splat(-INF);
    for (int n = 0; n < keys; n += LANES) top[q] = max(load<vfloat>(row + n), top[q]);
  }
  across_lanes<LANES / 2>(top, [](vfloat a, vfloat b) { return max(a, b); });
  const float to_log2 = unit * LOG2E;
  for (int q = 0; q < Q; ++q) {
    const vfloat before = splat(peak[q]), now = max(top[q], before);
    base[q] = select(now == -INF, splat(0.0f), now);
    peak[q] = now[0];
    factor[q] = exp2<true>((before - base[q]) * to_log2)[0];
    sum[q] = vfloat{};
  }
  const auto weight = [&](int q, int n) {
    const vfloat e = exp2<P::EXACT>((load<vfloat>(scores + q * BLOCK + n) - base[q]) * to_log2);
    sum[q] += e;
    return v_scales ? e * load<vfloat>(v_scales + n) : e;
  };
  for (int n = 0; n < padded; n += 2 * LANES)
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const vfloat first = weight(q, n), second = weight(q, n + LANES);
      store_weights<P, S>(scores + q * BLOCK, n, first, second);
    }
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  if constexpr (BYTES<P, S>)
    for (int q = 0; q < Q; ++q) {
      for (int n = padded; n < BLOCK; ++n) scores[q * BLOCK + n] = 0;
      whole_weights(scores + q * BLOCK);
    }
#endif
  across_lanes<LANES / 2>(sum, [](vfloat a, vfloat b) { return a + b; });
  for (int q = 0; q < Q; ++q) total[q] = total[q] * factor[q] + sum[q][0];
}

template <class P, class E>
void pack_query(typename P::unit* to, const E* from, int64_t dim) {
  if constexpr (P::STEP == 2)
    memcpy(to, from, dim * sizeof(E));
  else
    widen_rows((float*)to, dim, from, 0, 1, 1, int(dim));
}

// Calls act.template operator()<Q>(m) for queries m to m + Q that together are all of `count`.
template <class Act>
inline void in_fours(int64_t count, const Act& act) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) act.template operator()<4>(m);
  for (; m + 2 <= count; m += 2) act.template operator()<2>(m);
  for (; m < count; ++m) act.template operator()<1>(m);
}

// Asks for one head of a row of bytes, whose products do not ask for themselves.
template <class S>
inline void ask_for_head(const S* row, int64_t dim) {
  for (int64_t x = 0; x < dim; x += int64_t(LINE / sizeof(S))) __builtin_prefetch(row + x, 0, 2);
}

// Products of a block: four rows at a time with all of their heads. Scores past the last key are junk.
template <class P, class S>
void dot_block(const typename P::unit* queries, const float* query_units, int64_t heads, int64_t count, int64_t units,
               int64_t dims, const S* const* rows, const S* const* soon, int64_t head_stride, int keys, float* scores) {
  Ahead<S> ahead(soon, keys, heads, head_stride, count);
  const S* after[LANES];
  const auto some = [&]<int H, int Q>(int64_t kv, int64_t m, int n) {
    constexpr int GROUP = LANES / (H * Q);
    const S* at[GROUP];
    for (int g = 0; g < GROUP; ++g) at[g] = rows[n + g] + kv * head_stride;
    if (m == 0) ahead.template take<H, GROUP>(after, n, kv);
    const int64_t first = kv * count + m;
    float* to = scores + first * BLOCK + n;
    if constexpr (BYTES<P, S>)
      dot_bytes<H, Q>((const uint8_t*)(queries + first * units), query_units + first, count, round_up(dims, 64), dims,
                      at, head_stride, to, BLOCK, fold_all<LANES / 2>);
    else
      dot_keys<P, S, H, Q>(queries + first * units, count, units, at, after, head_stride, to);
  };
  constexpr int FEW = LANES < 4 ? LANES : 4;
  for (int n0 = 0; n0 < keys; n0 += FEW)
    for (int64_t kv = 0, step; kv < heads; kv += step) {
      // Queries of several heads fill a vector where those of one do not.
      step = LANES == 16 && count == 1 && kv + 4 <= heads ? 4 : LANES == 16 && count == 2 && kv + 2 <= heads ? 2 : 1;
      if constexpr (BYTES<P, S>)
        for (int64_t h = kv; h < kv + step; ++h)
          for (int n = n0; n < n0 + FEW; ++n) ask_for_head(soon[n] + h * head_stride, dims);
      if (step == 4) {
        some.template operator()<LANES == 16 ? 4 : 1, 1>(kv, 0, n0);
        continue;
      }
      if (step == 2) {
        some.template operator()<LANES == 16 ? 2 : 1, 2>(kv, 0, n0);
        continue;
      }
      in_fours(count, [&]<int Q>(int64_t m) {
        constexpr int GROUP = LANES / Q;
        if (GROUP <= FEW)
          for (int n = n0; n < n0 + FEW; n += GROUP) some.template operator()<1, Q>(kv, m, n);
        else if (n0 % GROUP == 0)
          some.template operator()<1, Q>(kv, m, n0);
      });
    }
}

template <class P, class E, class S>
void decode(const Problem& p, const Pages& pages, const ForwardTask& task, void* memory) {
  typedef typename P::unit unit_t;
  const int64_t group = p.group(), count = task.rows * group;  // queries of a kv head: row by row, each with its heads
  DecodeScratch<P> s(p, count, memory);
  constexpr bool WHOLE = BYTES<P, S>;
  const int64_t units = WHOLE ? 3 * round_up(p.head_dim, 64) / 4 : p.head_dim / P::STEP;
  const int64_t first_kv = task.h / group, heads = task.heads / group;  // kv heads
  const int64_t dims = p.head_dim_v, width = WHOLE ? round_up(dims, 64) : dims;
  const HeadScores first_head{p, task.seq, task.b, 0};
  const Span& span = task.seq.span;
  const int32_t* table = pages.table + task.b * pages.table_row;
  const float unit = first_head.unit();
  for (int64_t kv = 0; kv < heads; ++kv)
    for (int64_t m = 0; m < count; ++m) {
      unit_t* to = s.queries + (kv * count + m) * units;
      const E* from = p.q.at<E>(task.b, task.seq.row_q + task.row + m / group, task.h + kv * group + m % group);
      if constexpr (WHOLE)
        s.units[kv * count + m] = pack_whole((uint8_t*)to, round_up(p.head_dim, 64), from, p.head_dim);
      else
        pack_query<P, E>(to, from, p.head_dim);
    }
  memset(s.out, 0, heads * count * width * sizeof(float));
  for (int64_t n = 0; n < heads * count; ++n) {
    s.peak[n] = -INF;
    s.total[n] = 0;
  }

  const S *k_rows[BLOCK], *v_rows[BLOCK], *k_soon[BLOCK], *v_soon[BLOCK];
  const int64_t row_end = task.row + task.rows, key_end = clamp(task.key_end, 0, span.len_k);
  const auto find_rows = [&](int64_t j0, int64_t keys) {
    int64_t page = j0 / pages.page_size, slot = j0 % pages.page_size;
    const S *k = nullptr, *v = nullptr;
    const auto step = [&] {
      k = pages.k.at<S>(table[page], slot, first_kv);
      v = pages.v.at<S>(table[page], slot, first_kv);
      if (++slot == pages.page_size) slot = 0, ++page;
    };
    for (int64_t n = 0; n < BLOCK; ++n) {  // past the end: the last key again, with weight 0, not what lies there
      if (n < keys) step();
      k_rows[n] = k;
      v_rows[n] = v;
    }
    for (int64_t n = 0, j = j0 + keys; n < BLOCK; ++n) {  // after the block's keys come its values, then more keys
      const bool inside = n + AHEAD<S> < BLOCK;
      if (!inside && j++ < key_end) step();
      k_soon[n] = inside ? k_rows[n + AHEAD<S>] : v_rows[n + AHEAD<S> - BLOCK];
      v_soon[n] = inside ? v_rows[n + AHEAD<S>] : k;
    }
  };
  const auto next = [&](int64_t from) { return span.next(task.row, row_end, from); };
  for (int64_t j0 = next(task.key_begin), keys; j0 < key_end; j0 = next(j0 + keys)) {
    const int64_t run_end = span.run_end(task.row, row_end, j0);
    keys = clamp((run_end < key_end ? run_end : key_end) - j0, 1, BLOCK);
    find_rows(j0, keys);
    dot_block<P, S>(s.queries, s.units, heads, count, units, p.head_dim, k_rows, k_soon, pages.k.head, int(keys),
                    s.scores);

    const bool scaled_keys = QUANTISED<S> && pages.k_scales, scaled_values = QUANTISED<S> && pages.v_scales;
    const bool plain =
        !scaled_keys && first_head.is_scaled_product() && span.cover(task.row, row_end, j0, j0 + keys) == Cover::ALL;
    for (int64_t kv = 0; kv < heads; ++kv) {
      const PagedKeys<P, E, S> of_head{p, pages, table, first_kv + kv, 1, nullptr, 0, j0, j0 + keys};
      if (scaled_keys) of_head.scales(pages.k_scales, first_kv + kv, s.k_scales, j0, int(keys), BLOCK);
      if (scaled_values) of_head.scales(pages.v_scales, first_kv + kv, s.v_scales, j0, int(keys), BLOCK);
      for (int64_t m = 0; m < count && !plain; ++m) {
        const HeadScores head{p, task.seq, task.b, task.h + kv * group + m % group};
        finish_scores(head, task.row + m / group, j0, int(keys), s.scores + (kv * count + m) * BLOCK,
                      scaled_keys ? s.k_scales : nullptr);
      }
      in_fours(count, [&]<int Q>(int64_t m) {
        const int64_t at = kv * count + m;
        softmax_rows<P, S, Q>(unit, int(keys), s.scores + at * BLOCK, s.peak + at, s.total + at,
                              scaled_values ? s.v_scales : nullptr, s.factor + at);
      });
    }
    const auto add = [&]<int ROWS>() {
      Ahead<S> ahead(v_soon, keys, heads, pages.v.head, count);
      const S* after[ROWS];
      for (int64_t n = 0; n < keys; n += ROWS)
        for (int64_t kv = 0; kv < heads; ++kv) {
          ahead.template take<1, ROWS>(after, n, kv);
          if constexpr (WHOLE)
            for (const S* head : after) ask_for_head(head, dims);
          in_fours(count, [&]<int Q>(int64_t m) {
            static constexpr float ones[4] = {1, 1, 1, 1};
            const int64_t at = kv * count + m;
            const float* factor = n == 0 ? s.factor + at : ones;
            if constexpr (WHOLE)
              add_values<ROWS, Q>(s.scores + at * BLOCK, BLOCK, int(n), v_rows + n, kv * pages.v.head, width, dims,
                                  s.out + at * width, factor);
            else
              Accumulate<P, S, Q, ROWS>::run((const unit_t*)s.scores + at * BLOCK + n / P::STEP, v_rows + n, after,
                                             kv * pages.v.head, dims, s.out + at * dims, factor);
          });
        }
    };
    // With queries of several heads, memory is waited for, and best read row by row; with more, products are.
    if constexpr (!QUANTISED<S>)
      if (count > 1 && count <= 4) {
        add.template operator()<8 / sizeof(S)>();
        continue;
      }
    add.template operator()<MOST_VALUES>();
  }

  const bool is_final = task.slot < 0;
  alignas(64) float row[LANES];
  for (int64_t kv = 0; kv < heads; ++kv)
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = kv * count + m, h = task.h + kv * group + m % group, r = m / group;
      const float sum = s.total[at], of_keys = sum == 0 ? -INF : s.peak[at] * unit + __builtin_logf(sum);
      const auto lse_of = [&](int) { return of_keys; };
      const Union all(1, lse_of, is_final && p.sink ? p.sink + h : nullptr);
      const float lse = all.lse(), scale = sum == 0 ? 0 : 1 / sum * all.share(0);
      const int64_t out_row = is_final ? task.seq.row_q + task.row + r : task.slot + r;
      (is_final ? p.lse + task.b * p.lse_batch + h * p.lse_head : p.parts_lse + h * p.parts_lse_head)[out_row] = lse;
      const float* from = s.out + at * width;
      for (int64_t x = 0; x < dims; x += LANES) {
        for (int c = 0; c < LANES; ++c) row[c] = scale == 0 ? 0.0f : from[place<P, S>(x + c)] * scale;
        if (is_final)
          narrow(p.out.at<E>(task.b, out_row, h) + x, load<vfloat>(row));
        else
          store(p.parts.at<float>(0, out_row, h) + x, load<vfloat>(row));
      }
    }
}

template <class P, class E>
void decode_stored(const Problem& p, const Pages& pages, const ForwardTask& task, void* memory) {
  switch (pages.storage) {
    case Storage::AS_QUERIES: return decode<P, E, E>(p, pages, task, memory);
    case Storage::INT8: return decode<P, E, int8_t>(p, pages, task, memory);
    case Storage::FLOAT8_E4M3: return decode<P, E, f8>(p, pages, task, memory);
  }
}

template <class O>
void add_parts(const Problem& p, int64_t row, const int64_t* slots, int count) {
  for (int64_t h = 0; h < p.heads_q; ++h) {
    const auto lse_of = [&](int n) { return p.parts_lse[h * p.parts_lse_head + slots[n]]; };
    const Union parts(count, lse_of, p.sink ? p.sink + h : nullptr);
    p.lse[h * p.lse_head + row] = parts.lse();
    O* to = p.out.at<O>(0, row, h);
    for (int64_t x = 0; x < p.head_dim_v; x += LANES) {
      const int lanes = int(p.head_dim_v - x < LANES ? p.head_dim_v - x : LANES);
      vfloat sum{};
      for (int n = 0; n < count; ++n)  // not 0 * NaN
        if (const float share = parts.share(n); share != 0)
          sum += widen_partial(p.parts.at<float>(0, slots[n], h) + x, lanes) * share;
      narrow_partial(to + x, sum, lanes);
    }
  }
}

}  // namespace

const DecodeKernel decode = {
    ROWS_AT_MOST, 2 * LANES, LANES == 16 ? 4 : 1,
    [](const Problem& p, int64_t rows) { return DecodeScratch<Float32>(p, rows * p.group(), nullptr).carver.bytes; },
    [](const Problem& p, const Pages& pages, const ForwardTask& task, void* scratch) {
      switch (p.dtype) {
        case DType::FLOAT32: return decode_stored<Float32, float>(p, pages, task, scratch);
        case DType::FLOAT16: return decode_stored<Float32, f16>(p, pages, task, scratch);
        case DType::BFLOAT16: return decode_stored<Bf16Product, bf16>(p, pages, task, scratch);
        case DType::BOOL: return;
      }
    }};

const PartsKernel parts = {[](const Problem& p, int64_t row, const int64_t* slots, int count) {
  switch (p.dtype) {
    case DType::FLOAT32: return add_parts<float>(p, row, slots, count);
    case DType::FLOAT16: return add_parts<f16>(p, row, slots, count);
    case DType::BFLOAT16: return add_parts<bf16>(p, row, slots, count);
    case DType::BOOL: return;
  }
}};

}  // namespace duplex::DUPLEX_ISA
