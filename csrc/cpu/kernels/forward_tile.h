// One tile of queries of the forward: its share of scratch, the online softmax, and its way out.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"
#include "cpu/kernels/score.h"
#include "cpu/kernels/union.h"

namespace duplex::DUPLEX_ISA {

// Tiles of queries, of one head or several, that share one packed block of keys.
constexpr int TILES = PACKED > KEYS ? 16 : 8;

// Keys of a tile of scores: for the matrix unit few, which stay in the nearest cache between products and softmax.
template <class P>
constexpr int STRIP = P::MATRIX ? 32 : KEYS;

template <class P>
struct Layout {
  int64_t units, units_v;  // padded head dims: units of q and k, floats of v
  int64_t query_tile, out_tile;

  explicit Layout(const Problem& p)
      : units(round_up(p.head_dim, P::STEP * P::DEPTH) / P::STEP),
        units_v(round_up(p.head_dim_v, P::ROW_STEP)),
        query_tile(units * TILE),
        out_tile(units_v * TILE) {}
};

template <class P>
struct Scratch {
  Carver carver;
  typename P::unit *queries, *keys, *values, *values_t, *weights;
  float *out, *scores, *peak, *total, *rescale, *k_scales, *v_scales;
  ScoreScratch* score;
  void* stage;

  Scratch(const Problem& p, int64_t heads_kv, void* base) : carver{(char*)base} {
    const Layout<P> at(p);
    const int64_t taller = TILE > KEYS ? TILE : KEYS;
    queries = carver.take<typename P::unit>(TILES * at.query_tile);
    const int64_t packed = heads_kv * PACKED;
    keys = carver.take<typename P::unit>((taller > packed ? taller : packed) * at.units);
    values = carver.take<typename P::unit>(packed / P::STEP * at.units_v + LANES);
    values_t = carver.take<typename P::unit>(P::MATRIX ? packed / P::STEP * at.units_v : 0);
    weights = carver.take<typename P::unit>(P::STEP > 1 ? PACKED / P::STEP * TILE : 0);
    out = carver.take<float>(TILES * at.out_tile);
    scores = carver.take<float>(STRIP<P> * TILE);
    peak = carver.take<float>(TILES * TILE);
    total = carver.take<float>(TILES * TILE);
    rescale = carver.take<float>(TILE);
    score = carver.take<ScoreScratch>(1);
    k_scales = carver.take<float>(packed);
    v_scales = carver.take<float>(packed);
    stage = carver.take<float>(2 * (p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v));
  }
};

// Multiplies each key's scores, or weights, by what its stored numbers are worth.
inline void rescale_keys(float* scores, const TileRange& t, const float* scales, int keys) {
  for (int n = 0; n < keys; ++n)
    for (int m = 0; m < t.lanes(); m += LANES) {
      float* at = scores + n * TILE + m;
      store(at, load<vfloat>(at) * scales[n]);
    }
}

// Exponentials of V vectors of queries against the running peak; the sums go to `total`, the weights to the units of
// the product, or to the scores' place where they change LATER. Whether some peak has moved, so that old sums are to be
// multiplied by s.rescale.
template <class P, int V, bool LATER>
bool exponentials(float natural, int keys, Scratch<P>& s, typename P::unit* weights, float* peak, float* total,
                  bool first) {
  const float unit = natural * LOG2E;
  vfloat top[V], base[V], sum[V];
  vint grown{}, far{};
#pragma GCC unroll 4
  for (int x = 0; x < V; ++x) top[x] = first ? splat(-INF) : load<vfloat>(peak + x * LANES);
  for (int n = 0; n < keys; ++n)
#pragma GCC unroll 4
    for (int x = 0; x < V; ++x) top[x] = max(load<vfloat>(s.scores + n * TILE + x * LANES), top[x]);
#pragma GCC unroll 4
  for (int x = 0; x < V; ++x) {
    const vfloat before = first ? splat(-INF) : load<vfloat>(peak + x * LANES);
    // Where old sums are costly to rescale, they stay relative to an earlier peak, as long as weights are small.
    const vfloat now = P::MATRIX ? select((top[x] - before) * unit > 8.0f, top[x], before) : top[x];
    store(peak + x * LANES, now);
    base[x] = select(now == -INF, splat(0.0f), now);
    vfloat factor;
    if constexpr (P::EXACT) {
      factor = exp2<true>((before - base[x]) * unit);  // the difference first: its rounding is relative to it
    } else {
      // One rounding of a peak in all that is relative to it: whatever it is, it cancels.
      const vfloat product = rounded(base[x] * unit);
      const vint beyond = abs(product) == INF;
      factor = exp2<true>(select(beyond, (before - base[x]) * unit, rounded(before * unit) - product));
      far |= beyond;
    }
    store(s.rescale + x * LANES, factor);
    grown |= factor != 1.0f;
    sum[x] = first ? vfloat{} : load<vfloat>(total + x * LANES) * factor;
  }
  const auto weigh = [&]<bool DIFFERENCE>() {
    vfloat subtracted[V];
#pragma GCC unroll 4
    for (int x = 0; x < V; ++x) subtracted[x] = DIFFERENCE ? base[x] : rounded(base[x] * unit);
    const auto weight = [&](const float* at, int x) {
      const vfloat score = load<vfloat>(at);
      return exp2<P::EXACT>(DIFFERENCE ? (score - subtracted[x]) * unit : score * unit - subtracted[x]);
    };
    for (int n = 0; n < keys; n += 2) {
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) {
        float* at = s.scores + n * TILE + x * LANES;
        const vfloat even = weight(at, x), odd = weight(at + TILE, x);
        sum[x] += even + odd;
        if constexpr (P::STEP == 2 && !LATER) {
          store_pairs(weights + n / 2 * TILE + x * LANES, even, odd);
        } else {
          store(at, even);
          store(at + TILE, odd);
        }
      }
    }
  };
  if constexpr (P::EXACT)
    weigh.template operator()<true>();
  else if (any(far))  // a bias of finfo.min, times log2(e)
    weigh.template operator()<true>();
  else
    weigh.template operator()<false>();
#pragma GCC unroll 4
  for (int x = 0; x < V; ++x) store(total + x * LANES, sum[x]);
  return any(grown);
}

template <class P>
bool softmax(const HeadScores& head, const TileRange& t, int keys, Scratch<P>& s, typename P::unit* weights,
             float* peak, float* total, bool first, const float* v_scales) {
  const bool dropout = head.problem.dropout, later = dropout || v_scales;
  const auto run = [&]<int V>() {
    return later ? exponentials<P, V, true>(head.unit(), keys, s, weights, peak, total, first)
                 : exponentials<P, V, false>(head.unit(), keys, s, weights, peak, total, first);
  };
  bool grown = false;
  switch (t.vectors()) {
    case 1: grown = run.template operator()<1>(); break;
    case 2: grown = run.template operator()<2>(); break;
    case 3: grown = run.template operator()<3>(); break;
    case 4: grown = run.template operator()<4>(); break;
  }
  if (!later) return grown;
  if (dropout) head.drop(t, s.scores);
  if (v_scales) rescale_keys(s.scores, t, v_scales, keys);
  if constexpr (P::STEP == 2)
    for (int n = 0; n < keys; n += 2)
      for (int m = 0; m < t.lanes(); m += LANES)
        store_pairs(weights + n / 2 * TILE + m, load<vfloat>(s.scores + n * TILE + m),
                    load<vfloat>(s.scores + (n + 1) * TILE + m));
  return grown;
}

// Divides by the sums and writes rows from `out_row` on; a row that saw nothing is 0 with lse -inf.
template <class P, class O>
void finish_tile(const HeadScores& head, const TileRange& t, float* out_t, float* peak, float* total, bool empty,
                 const View& out, int64_t out_row, float* lse, const float* sink_of_head) {
  const Problem& p = head.problem;
  const int64_t units_v = Layout<P>(p).units_v;
  alignas(64) float factor[TILE], share[TILE];
  for (int m = 0; m < t.rows; ++m) {
    const float sum = empty ? 0 : total[m], of_keys = sum == 0 ? -INF : peak[m] * head.unit() + __builtin_logf(sum);
    factor[m] = sum == 0 ? 0 : 1 / sum * p.keep_scale;
    share[m] = 1;
    lse[m] = of_keys;
    if (!sink_of_head) continue;
    const auto lse_of = [&](int) { return of_keys; };
    const Union all(1, lse_of, sink_of_head);
    share[m] = all.share(0);  // in a step of its own, as where parts are put together: so no bit depends on how many
    lse[m] = all.lse();
  }
  for (int m0 = 0; m0 < t.rows; m0 += LANES)
    for (int x = 0; x < p.head_dim_v; x += LANES) {
      vint square[LANES];  // of dims, then of queries
      for (int r = 0; r < LANES; ++r) square[r] = x + r < units_v ? load<vint>(out_t + (x + r) * TILE + m0) : vint{};
      transpose_square(square);
      const int dims = p.head_dim_v - x < LANES ? int(p.head_dim_v - x) : LANES;
      for (int m = m0; m < t.rows && m < m0 + LANES; ++m) {
        O* to = out.at<O>(head.b, out_row + m, head.h) + x;
        const vfloat value = factor[m] == 0 ? vfloat{} : (vfloat)square[m - m0] * factor[m] * share[m];  // not 0 * NaN
        if (dims == LANES)
          narrow(to, value);
        else
          narrow_partial(to, value, dims);
      }
    }
}

}  // namespace duplex::DUPLEX_ISA
