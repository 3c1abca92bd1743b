// Attention of a few queries over pages: bound by reading the cache, so a task goes through its pages once, in the order
// they lie in memory, with all heads, and asks for the next ones meanwhile.
//
// Vectors lie along the head_dim for <q, k> and for the output, along the keys for the softmax between them.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"
#include "cpu/kernels/score.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int QUERIES = 8;                       // rows x heads of one kv head
constexpr int64_t BLOCK_BYTES = 192 << 10;       // of keys and values of all heads: this block and the next fit in L2
constexpr int MOST_KEYS = 64, FEWEST_KEYS = 16;  // of a block
static_assert(FEWEST_KEYS % LANES == 0);

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
template <>
struct Units<BFloat16, int8_t> {
  static vuint load(const int8_t* from) { return bf16_pairs(widen(from), widen(from + LANES)); }
};
template <>
struct Units<BFloat16, f8> {
  static vuint load(const f8* from) { return bf16_pairs(widen(from), widen(from + LANES)); }
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

inline float largest(vfloat v) {
  float top = v[0];
  for (int c = 1; c < LANES; ++c) top = v[c] > top ? v[c] : top;
  return top;
}

// scores[q * MOST_KEYS + n] = <q, k_n> for Q queries and `keys` keys, LANES products at a time.
template <class P, class S, int Q>
void dot_keys(const typename P::unit* queries, int64_t units, const S* const* rows, int64_t offset, int keys,
              float* scores) {
  constexpr int GROUP = LANES / Q;
  for (int n = 0; n < keys; n += GROUP) {
    vfloat sum[LANES] = {};
    const S* at[GROUP];
    for (int g = 0; g < GROUP; ++g) at[g] = rows[n + g] + offset;
    for (int64_t x = 0; x < units; x += LANES) {
      typename P::vector key[GROUP];
#pragma GCC unroll 16
      for (int g = 0; g < GROUP; ++g) key[g] = Units<P, S>::load(at[g] + x * P::STEP);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const auto query = load<typename P::vector>(queries + q * units + x);
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; ++g) sum[q * GROUP + g] = P::multiply_add(sum[q * GROUP + g], query, key[g]);
      }
    }
    fold_all<LANES / 2>(sum);
    alignas(64) float products[LANES];
    store(products, sum[0]);
    for (int q = 0; q < Q; ++q) memcpy(scores + q * MOST_KEYS + n, products + q * GROUP, GROUP * sizeof(float));
  }
}

// out[q * dims + x] = factor[q] * out + sum over keys of weights[q * MOST_KEYS + n] * v_n[x].
template <class P, class S, int Q>
struct Accumulate {
  static void run(const float* weights, const S* const* rows, int64_t offset, int keys, int64_t dims, float* out,
                  const float* factor) {
    constexpr int WIDE = 4;
    int64_t x = 0;
    for (; x + WIDE * LANES <= dims; x += WIDE * LANES) part<WIDE>(weights, rows, offset, keys, dims, out, factor, x);
    for (; x < dims; x += LANES) part<1>(weights, rows, offset, keys, dims, out, factor, x);
  }
  template <int WIDE>
  static void part(const float* weights, const S* const* rows, int64_t offset, int keys, int64_t dims, float* out,
                   const float* factor, int64_t x) {
    vfloat sum[Q][WIDE];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sum[q][w] = load<vfloat>(out + q * dims + x + w * LANES) * factor[q];
    for (int n = 0; n < keys; ++n) {
      const S* from = rows[n] + offset + x;
      vfloat value[WIDE];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) value[w] = widen(from + w * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const vfloat weight = splat(weights[q * MOST_KEYS + n]);
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

// Where element x of the output lies in the accumulator.
template <class P>
inline int64_t place(int64_t x) {
  return x;
}

#if defined(__AVX512BF16__)
// Neighbouring keys are one unit: their rows are interleaved within 128 bits, which orders the accumulator as `place` says.
template <class S, int Q>
struct Accumulate<BFloat16, S, Q> {
  static void run(const float* weights, const S* const* rows, int64_t offset, int keys, int64_t dims, float* out,
                  const float* factor) {
    alignas(64) uint32_t pairs[Q * MOST_KEYS / 2];
    for (int q = 0; q < Q; ++q)
      for (int n = 0; n < keys; n += 2 * LANES) {
        const float* at = weights + q * MOST_KEYS + n;  // zero past the last key
        store(pairs + q * MOST_KEYS / 2 + n / 2, bf16_pairs(load<vfloat>(at), load<vfloat>(at + LANES)));
      }
    int64_t x = 0;
    for (; x + 4 * LANES <= dims; x += 4 * LANES) part<2>(pairs, rows, offset, keys, dims, out, factor, x);
    for (; x < dims; x += 2 * LANES) part<1>(pairs, rows, offset, keys, dims, out, factor, x);
  }
  template <int CHUNKS>
  static void part(const uint32_t* pairs, const S* const* rows, int64_t offset, int keys, int64_t dims, float* out,
                   const float* factor, int64_t x) {
    constexpr int WIDE = 2 * CHUNKS;
    vfloat sum[Q][WIDE];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sum[q][w] = load<vfloat>(out + q * dims + x + w * LANES) * factor[q];
    for (int n = 0; n < keys; n += 2) {
      vuint value[WIDE];
#pragma GCC unroll 2
      for (int c = 0; c < CHUNKS; ++c) {
        const __m512i first = (__m512i)Units<BFloat16, S>::load(rows[n] + offset + x + c * 2 * LANES);
        const __m512i second = (__m512i)Units<BFloat16, S>::load(rows[n + 1] + offset + x + c * 2 * LANES);
        value[2 * c] = (vuint)_mm512_unpacklo_epi16(first, second);
        value[2 * c + 1] = (vuint)_mm512_unpackhi_epi16(first, second);
      }
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const vuint weight = BFloat16::splat_unit(pairs[q * MOST_KEYS / 2 + n / 2]);
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
template <>
inline int64_t place<BFloat16>(int64_t x) {
  return x / 32 * 32 + x % 8 / 4 * 16 + x % 32 / 8 * 4 + x % 4;
}
// Weight pairs in the order of the keys, where store_pairs of the products wants halves.
#endif

template <class P>
struct DecodeScratch {
  Carver carver;
  typename P::unit* queries;                   // [kv head][query][units]
  float *out, *peak, *total;                   // [kv head][query] ([dims])
  float *scores, *k_scales, *v_scales, *bias;  // [query][MOST_KEYS], [MOST_KEYS]
  float* staged;                               // one query

  DecodeScratch(const Problem& p, int64_t queries_a_kv, void* base) : carver{(char*)base} {
    const int64_t count = p.heads_kv * queries_a_kv;
    queries = carver.take<typename P::unit>(count * p.head_dim / P::STEP);
    out = carver.take<float>(count * p.head_dim_v);
    peak = carver.take<float>(count);
    total = carver.take<float>(count);
    scores = carver.take<float>(QUERIES * MOST_KEYS);
    k_scales = carver.take<float>(MOST_KEYS);
    v_scales = carver.take<float>(MOST_KEYS);
    bias = carver.take<float>(MOST_KEYS);
    staged = carver.take<float>(p.head_dim);
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
  if (span.cover(i, i + 1, j0, j0 + keys) != Cover::ALL)
    for (int n = 0; n < keys; ++n)
      if (!span.sees(i, j0 + n)) scores[n] = -INF;
}

// Exponentials of one query against its running peak; weights past the last key are 0. Returns the old sums' factor.
template <bool EXACT>
float softmax_row(float unit, int keys, float* scores, float& peak, float& total, const float* v_scales) {
  const int padded = int(round_up(keys, 2 * LANES));  // a vector of pairs of keys
  for (int n = keys; n < padded; ++n) scores[n] = -INF;
  vfloat highest = splat(-INF);
  for (int n = 0; n < padded; n += LANES) highest = max(load<vfloat>(scores + n), highest);
  const float before = peak, now = max(splat(largest(highest)), splat(before))[0];
  const float base = now == -INF ? 0 : now;
  peak = now;
  vfloat sum{};
  for (int n = 0; n < padded; n += LANES) {
    vfloat weight = exp2<EXACT>((load<vfloat>(scores + n) - base) * (unit * LOG2E));
    sum += weight;
    if (v_scales) weight *= load<vfloat>(v_scales + n);
    store(scores + n, weight);
  }
  const float factor = exp2<true>(splat((before - base) * unit * LOG2E))[0];
  total = total * factor + DUPLEX_ISA::sum(sum);
  return factor;
}

template <class P, class E>
void pack_query(typename P::unit* to, const E* from, int64_t dim, float* staged) {
  if constexpr (P::STEP == 2)
    memcpy(to, from, dim * sizeof(E));
  else
    widen_rows((float*)to, dim, from, 0, 1, 1, int(dim));
}

template <class P, class E, class S>
void decode(const Problem& p, const Pages& pages, const ForwardTask& task, void* memory) {
  const int64_t group = p.group(), count = task.rows * group;  // queries of a kv head: row by row, each with its heads
  DecodeScratch<P> s(p, count, memory);
  const int64_t units = p.head_dim / P::STEP, dims = p.head_dim_v;
  const HeadScores first_head{p, task.seq, task.b, 0};
  const Span& span = task.seq.span;
  const int32_t* table = pages.table + task.b * pages.table_row;
  const float unit = first_head.unit();
  for (int64_t kv = 0; kv < p.heads_kv; ++kv)
    for (int64_t m = 0; m < count; ++m)
      pack_query<P, E>(s.queries + (kv * count + m) * units,
                       p.q.at<E>(task.b, task.seq.row_q + task.row + m / group, kv * group + m % group), p.head_dim,
                       s.staged);
  memset(s.out, 0, p.heads_kv * count * dims * sizeof(float));
  for (int64_t n = 0; n < p.heads_kv * count; ++n) {
    s.peak[n] = -INF;
    s.total[n] = 0;
  }

  const int64_t row_end = task.row + task.rows, key_end = clamp(task.key_end, 0, span.len_k);
  const int64_t row_bytes = p.heads_kv * (p.head_dim + p.head_dim_v) * int64_t(sizeof(S));
  const int block = int(clamp(BLOCK_BYTES / row_bytes / FEWEST_KEYS * FEWEST_KEYS, FEWEST_KEYS, MOST_KEYS));
  const auto next = [&](int64_t j) { return span.next(task.row, row_end, j); };
  const S *k_rows[MOST_KEYS], *v_rows[MOST_KEYS], *k_soon[MOST_KEYS], *v_soon[MOST_KEYS];
  const auto find_rows = [&](int64_t j0, int keys, const S** k, const S** v) {
    for (int n = 0; n < keys; ++n) {
      const int64_t page = table[(j0 + n) / pages.page_size], slot = (j0 + n) % pages.page_size;
      k[n] = pages.k.at<S>(page, slot, 0);
      v[n] = pages.v.at<S>(page, slot, 0);
    }
    for (int n = keys; n < MOST_KEYS; ++n) {  // read, with weight 0: the last key, not what lies past it
      k[n] = k[keys - 1];
      v[n] = v[keys - 1];
    }
  };
  const auto block_at = [&](int64_t from) {
    const int64_t run_end = span.run_end(task.row, row_end, from);
    return int(clamp((run_end < key_end ? run_end : key_end) - from, 0, block));
  };
  int64_t j = next(task.key_begin);
  int keys = block_at(j);
  if (keys > 0) find_rows(j, keys, k_rows, v_rows);
  while (keys > 0) {
    const int64_t j0 = j;
    j = next(j0 + keys);
    const int soon = block_at(j);
    if (soon > 0) find_rows(j, soon, k_soon, v_soon);
    for (int64_t kv = 0; kv < p.heads_kv; ++kv) {
      // The next block row by row, all heads of each: memory gives its best in order.
      for (int64_t n = soon * kv / p.heads_kv; n < soon * (kv + 1) / p.heads_kv; ++n)
        for (int64_t h = 0; h < p.heads_kv; ++h) {
          prefetch_rows(k_soon[n] + h * pages.k.head, 0, 1, p.head_dim);
          prefetch_rows(v_soon[n] + h * pages.v.head, 0, 1, p.head_dim_v);
        }
      const float *k_scales = nullptr, *v_scales = nullptr;
      if constexpr (QUANTISED<S>) {
        const PagedKeys<P, E, S> keys_of_head{p, pages, table, kv, nullptr, 0, j0, j0 + keys};
        if (pages.k_scales) keys_of_head.scales(pages.k_scales, s.k_scales, j0, keys, MOST_KEYS);
        if (pages.v_scales) keys_of_head.scales(pages.v_scales, s.v_scales, j0, keys, MOST_KEYS);
        k_scales = pages.k_scales ? s.k_scales : nullptr;
        v_scales = pages.v_scales ? s.v_scales : nullptr;
      }
      const auto several = [&]<int Q>(int64_t m) {
        const int64_t at = kv * count + m;
        float factor[Q];
        dot_keys<P, S, Q>(s.queries + at * units, units, k_rows, kv * pages.k.head, keys, s.scores);
        for (int q = 0; q < Q; ++q) {
          const HeadScores head{p, task.seq, task.b, kv * group + (m + q) % group};
          float* scores = s.scores + q * MOST_KEYS;
          finish_scores(head, task.row + (m + q) / group, j0, keys, scores, k_scales);
          factor[q] = softmax_row<P::EXACT>(unit, keys, scores, s.peak[at + q], s.total[at + q], v_scales);
        }
        Accumulate<P, S, Q>::run(s.scores, v_rows, kv * pages.v.head, keys, dims, s.out + at * dims, factor);
      };
      int64_t m = 0;
      for (; m + 4 <= count; m += 4) several.template operator()<4>(m);
      for (; m + 2 <= count; m += 2) several.template operator()<2>(m);
      for (; m < count; ++m) several.template operator()<1>(m);
    }
    memcpy(k_rows, k_soon, sizeof k_rows);
    memcpy(v_rows, v_soon, sizeof v_rows);
    keys = soon;
  }

  const bool is_final = task.slot < 0;
  alignas(64) float row[LANES];
  for (int64_t kv = 0; kv < p.heads_kv; ++kv)
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = kv * count + m, h = kv * group + m % group, r = m / group;
      float top = s.peak[at] * unit, sum = top == -INF ? 0 : s.total[at], shrink = 1;
      if (is_final && p.sink) {
        const float sink = p.sink[h], higher = sink > top ? sink : top;
        shrink = top == -INF ? 0 : __builtin_expf(top - higher);
        sum = higher == -INF ? 0 : sum * shrink + __builtin_expf(sink - higher);
        top = higher;
      }
      const float lse = sum == 0 ? -INF : top + __builtin_logf(sum), scale = sum == 0 ? 0 : shrink / sum;
      const int64_t out_row = is_final ? task.seq.row_q + task.row + r : task.slot + r;
      (is_final ? p.lse + h * p.lse_head : p.parts_lse + h * p.parts_lse_head)[out_row] = lse;
      const float* from = s.out + at * dims;
      for (int64_t x = 0; x < dims; x += LANES) {
        for (int c = 0; c < LANES; ++c) row[c] = scale == 0 ? 0.0f : from[place<P>(x + c)] * scale;
        if (is_final)
          narrow(p.out.at<E>(0, out_row, h) + x, load<vfloat>(row));
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
    const float* lses = p.parts_lse + h * p.parts_lse_head;
    float top = p.sink ? p.sink[h] : -INF, total = 0;
    for (int n = 0; n < count; ++n) top = lses[slots[n]] > top ? lses[slots[n]] : top;
    if (top > -INF) {
      if (p.sink) total += __builtin_expf(p.sink[h] - top);
      for (int n = 0; n < count; ++n) total += __builtin_expf(lses[slots[n]] - top);
    }
    p.lse[h * p.lse_head + row] = top == -INF ? -INF : top + __builtin_logf(total);
    O* to = p.out.at<O>(0, row, h);
    for (int64_t x = 0; x < p.head_dim_v; x += LANES) {
      const int lanes = int(p.head_dim_v - x < LANES ? p.head_dim_v - x : LANES);
      vfloat sum{};
      for (int n = 0; n < count && top > -INF; ++n) {
        const float weight = __builtin_expf(lses[slots[n]] - top) / total;
        if (weight > 0) sum += widen_partial(p.parts.at<float>(0, slots[n], h) + x, lanes) * weight;
      }
      narrow_partial(to + x, sum, lanes);
    }
  }
}

}  // namespace

const DecodeKernel decode = {
    QUERIES, 2 * LANES,
    [](const Problem& p, const Pages&, int64_t rows) {
      return DecodeScratch<Float32>(p, rows * p.group(), nullptr).carver.bytes;
    },
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
