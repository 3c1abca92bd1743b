// Attention of a few queries over pages: bound by reading the cache, so a task reads a block of keys, then of values,
// in the order in which they lie in memory: row by row with all heads, or head by head. That is what hardware
// prefetchers follow.
//
// Vectors lie along the head_dim for <q, k> and for the output, along the keys for the softmax between them.
#include "cpu/kernels/bytes.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/union.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int ROWS_AT_MOST = 12;  // from about there on the forward kernel's tiles of queries cost less
static_assert(BLOCK % (2 * LANES) == 0);

// Whether stored numbers are multiplied as bytes.
template <class P, class S>
constexpr bool BYTES = false;
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
template <>
constexpr bool BYTES<BFloat16, int8_t> = true;
static_assert(BLOCK == 64);
#endif

// Every lane becomes the largest, or the sum, of all; Q vectors at once hide each other's latency.
template <int STRIDE, int Q, class Combine>
inline void across_lanes(vfloat (&v)[Q], const Combine& combine) {
  vint other;
  for (int c = 0; c < LANES; ++c) other[c] = c ^ STRIDE;
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) v[q] = combine(v[q], (vfloat)shuffle((vint)v[q], (vint)v[q], other));
  if constexpr (STRIDE > 1) across_lanes<STRIDE / 2>(v, combine);
}

// Where element x of the output lies in the accumulator.
template <class P, class S>
inline int64_t place(int64_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  if constexpr (BYTES<P, S>) return place_of_byte(x);
#endif
  return Values<P, S>::place(x);
}

template <class P>
struct DecodeScratch {
  Carver carver;
  typename P::unit* queries;     // [kv head][query][units]
  float *units, *out;            // [kv head][query] ([dims])
  float *peak, *total, *factor;  // [kv head][query]
  float *scores, *products;      // [kv head][query][BLOCK]
  float *k_scales, *v_scales;    // [kv head][BLOCK]

  DecodeScratch(const Problem& p, int64_t queries_a_kv, void* base) : carver{(char*)base} {
    const int64_t count = p.heads_kv * queries_a_kv;
    queries = carver.take<typename P::unit>(count * round_up(p.head_dim, 64));
    units = carver.take<float>(count);
    out = carver.take<float>(count * round_up(p.head_dim_v, 64));
    peak = carver.take<float>(count);
    total = carver.take<float>(count);
    factor = carver.take<float>(count);
    scores = carver.take<float>(count * BLOCK);
    products = carver.take<float>(count * BLOCK + LANES);
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

  // Memory is read row by row, or head by head where rows of a head lie side by side.
  const bool by_head = !WHOLE && pages.k.head > pages.k.row;
  const int64_t together = by_head ? 1 : heads, last = heads - together;
  const int ahead = rows_ahead<S>(together * p.head_dim, count);
  const S *k_rows[BLOCK + MOST_AHEAD], *v_rows[BLOCK + MOST_AHEAD];  // of a block, and what is read after them
  const int64_t row_end = task.row + task.rows, key_end = clamp(task.key_end, 0, span.len_k);
  const auto find = [&](const View& view, int64_t j, int64_t end, int most, const S** to, const S* otherwise) {
    int n = 0;
    for (int64_t run; n < most && j < end; j += run) {
      const int64_t slot = j % pages.page_size;
      run = clamp(pages.page_size - slot, 0, end - j < most - n ? end - j : most - n);
      const S* from = view.at<S>(table[j / pages.page_size], slot, first_kv);
      for (int64_t i = 0; i < run; ++i) to[n++] = from + i * view.row;
    }
    for (const S* last_row = n ? to[n - 1] : otherwise; n < most; ++n) to[n] = last_row;  // not what lies behind it
  };
  // What is asked for while the last rows are read. Where heads of values lie otherwise than those of keys, other lines
  // are asked for than will be read.
  const auto then = [&](const S** rows, const S* const* following, int64_t offset) {
    for (int n = 0; n < ahead; ++n) rows[BLOCK + n] = following[n] + offset;
  };
  const auto next = [&](int64_t from) { return span.next(task.row, row_end, from); };
  for (int64_t j0 = next(task.key_begin), keys; j0 < key_end; j0 = next(j0 + keys)) {
    const int64_t run_end = span.run_end(task.row, row_end, j0);
    keys = clamp((run_end < key_end ? run_end : key_end) - j0, 1, BLOCK);
    find(pages.k, j0, j0 + keys, BLOCK, k_rows, nullptr);
    find(pages.v, j0, j0 + keys, BLOCK, v_rows, nullptr);
    if constexpr (WHOLE) {
      then(k_rows, v_rows, 0);
      dot_block_of_bytes((const uint8_t*)s.queries, s.units, heads, count, p.head_dim, k_rows, k_rows + ahead,
                         pages.k.head, int(keys), s.scores);
    } else {
      for (int64_t kv = 0; kv < heads; kv += together) {
        if (kv == last)
          then(k_rows, v_rows, -last * pages.k.head);
        else if (kv == 0)
          then(k_rows, k_rows, pages.k.head);
        dot_block<P, S>(s.queries + kv * count * units, {together, kv * pages.k.head, pages.k.head}, count, units,
                        k_rows, k_rows + ahead, int(keys), s.products, s.scores + kv * count * BLOCK);
      }
    }

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
    const S* after[MOST_AHEAD];
    find(pages.k, next(j0 + keys), key_end, ahead, after, v_rows[BLOCK - 1]);
    if constexpr (WHOLE) {
      then(v_rows, after, 0);
      add_block_of_bytes(s.scores, heads, count, v_rows, v_rows + ahead, pages.v.head, int(keys), dims, s.out,
                         s.factor);
    } else {
      for (int64_t kv = 0; kv < heads; kv += together) {
        if (kv == last)
          then(v_rows, after, -last * pages.v.head);
        else if (kv == 0)
          then(v_rows, v_rows, pages.v.head);
        add_block<P, S>((const unit_t*)s.scores + kv * count * BLOCK, {together, kv * pages.v.head, pages.v.head},
                        count, v_rows, v_rows + ahead, int(keys), dims, s.out + kv * count * dims,
                        s.factor + kv * count);
      }
    }
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
    ROWS_AT_MOST, 2 * LANES,
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
