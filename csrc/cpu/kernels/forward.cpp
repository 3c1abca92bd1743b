// Forward attention over a block of queries, with the online softmax of FlashAttention-2 (arXiv 2307.08691).
//
// Scores are kept transposed, [key][query]: a vector holds one key and neighbouring queries. So maxima and sums need no
// work across lanes, keys and values enter the products as broadcasts of rows as they lie in memory, and only the
// queries are transposed, once a block.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/score.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int TILES = 8;  // tiles of queries that share one packed block of keys

template <class P>
struct Layout {
  int64_t units, units_v;  // padded head dims: units of q and k, floats of v
  int64_t query_tile, out_tile;

  explicit Layout(const Problem& p)
      : units(round_up(p.head_dim, P::STEP) / P::STEP),
        units_v(round_up(p.head_dim_v, ROWS)),
        query_tile(units * TILE),
        out_tile(units_v * TILE) {}
};

template <class P>
struct Scratch {
  Carver carver;
  typename P::unit *queries, *keys, *values, *weights;
  float *out, *scores, *peak, *total, *rescale;
  ScoreScratch* score;

  Scratch(const Problem& p, void* base) : carver{(char*)base} {
    const Layout<P> at(p);
    const int64_t stage = TILE > KEYS ? TILE : KEYS;
    const int64_t rows = round_up(p.head_dim_v, LANES) * TILE;  // of the output, on their way out
    queries = carver.take<typename P::unit>(TILES * at.query_tile > rows ? TILES * at.query_tile : rows);
    keys = carver.take<typename P::unit>(stage * at.units);
    values = carver.take<typename P::unit>(KEYS / P::STEP * at.units_v + LANES);
    weights = carver.take<typename P::unit>(P::STEP > 1 ? KEYS / P::STEP * TILE : 0);
    out = carver.take<float>(TILES * at.out_tile);
    scores = carver.take<float>(KEYS * TILE);
    peak = carver.take<float>(TILES * TILE);
    total = carver.take<float>(TILES * TILE);
    rescale = carver.take<float>(TILE);
    score = carver.take<ScoreScratch>(1);
  }
};

// Exponentials of one tile against the running peak; the sums go to `total`, the weights to the units of the product.
template <class P>
void softmax(const HeadScores& head, const TileRange& t, int keys, Scratch<P>& s, float* peak, float* total,
             bool first) {
  const float unit = head.unit() * LOG2E;
  const int vectors = t.vectors();
  vfloat base[VECS], sum[VECS];
  for (int x = 0; x < vectors; ++x) {
    const vfloat before = first ? splat(-INF) : load<vfloat>(peak + x * LANES);
    vfloat now = before;
    for (int n = 0; n < keys; ++n) now = max(load<vfloat>(s.scores + n * TILE + x * LANES), now);
    store(peak + x * LANES, now);
    base[x] = select(now == -INF, splat(0.0f), now);
    const vfloat factor =
        exp2<true>((before - base[x]) * unit);  // the difference first: its rounding is relative to it
    store(s.rescale + x * LANES, factor);
    sum[x] = first ? vfloat{} : load<vfloat>(total + x * LANES) * factor;
  }
  const bool dropout = head.problem.dropout;
  for (int n = 0; n < keys; n += 2)
    for (int x = 0; x < vectors; ++x) {
      float* at = s.scores + n * TILE + x * LANES;
      const vfloat even = exp2<P::EXACT>((load<vfloat>(at) - base[x]) * unit);
      const vfloat odd = exp2<P::EXACT>((load<vfloat>(at + TILE) - base[x]) * unit);
      sum[x] += even + odd;
      if constexpr (P::STEP == 2) {
        if (!dropout) {
          store_pairs(s.weights + n / 2 * TILE + x * LANES, even, odd);
          continue;
        }
      }
      store(at, even);
      store(at + TILE, odd);
    }
  for (int x = 0; x < vectors; ++x) store(total + x * LANES, sum[x]);
  if (!dropout) return;
  head.drop(t, s.scores);
  if constexpr (P::STEP == 2)
    for (int n = 0; n < keys; n += 2)
      for (int m = 0; m < t.lanes(); m += LANES)
        store_pairs(s.weights + n / 2 * TILE + m, load<vfloat>(s.scores + n * TILE + m),
                    load<vfloat>(s.scores + (n + 1) * TILE + m));
}

// Divides by the sums and writes rows; a row that saw nothing is 0 with lse -inf.
template <class P, class E>
void finish_tile(const HeadScores& head, const TileRange& t, float* out_t, float* peak, float* total, bool empty,
                 float* rows) {
  const Problem& p = head.problem;
  const int64_t dims = round_up(p.head_dim_v, LANES), units_v = Layout<P>(p).units_v;
  if (empty) memset(out_t, 0, Layout<P>(p).out_tile * sizeof(float));
  alignas(64) float factor[TILE];
  float* lse = p.lse + head.b * p.lse_batch + head.h * p.lse_head + head.seq.row_q + t.i0;
  for (int m = 0; m < t.rows; ++m) {
    float top = empty ? -INF : peak[m] * head.unit(), sum = empty ? 0 : total[m], shrink = 1;
    if (top == -INF) sum = 0;
    if (p.sink) {
      const float sink = p.sink[head.h], higher = sink > top ? sink : top;
      if (higher == -INF) {
        sum = 0;
      } else {
        shrink = top == -INF ? 0 : __builtin_expf(top - higher);
        sum = sum * shrink + __builtin_expf(sink - higher);
        top = higher;
      }
    }
    factor[m] = sum == 0 ? 0 : shrink / sum * p.keep_scale;
    lse[m] = sum == 0 ? -INF : top + __builtin_logf(sum);
  }
  transpose_units((uint32_t*)rows, dims, (const uint32_t*)out_t, TILE, int(units_v), t.lanes());
  for (int m = 0; m < t.rows; ++m) {
    E* to = p.out.at<E>(head.b, head.seq.row_q + t.i0 + m, head.h);
    const float* from = rows + m * dims;
    if (factor[m] == 0) {  // not by multiplication: 0 * NaN
      memset(to, 0, p.head_dim_v * sizeof(E));
      continue;
    }
    int x = 0;
    for (; x + LANES <= p.head_dim_v; x += LANES) narrow(to + x, load<vfloat>(from + x) * factor[m]);
    if (x < p.head_dim_v) narrow_partial(to + x, load<vfloat>(from + x) * factor[m], int(p.head_dim_v - x));
  }
}

template <class P, class E>
void forward_rows(const Problem& p, const ForwardTask& task, void* memory) {
  const Layout<P> at(p);
  Scratch<P> s(p, memory);
  const HeadScores head{p, sequence(p, task.b), task.b, task.h};
  const Span& span = head.seq.span;
  const int64_t kv = task.h / p.group();
  const int tiles = (task.rows + TILE - 1) / TILE;
  bool empty[TILES];
  TileRange ranges[TILES];
  for (int t = 0; t < tiles; ++t) {
    const int64_t i0 = task.row + t * TILE;
    ranges[t] = {i0, 0, int(clamp(task.row + task.rows - i0, 0, TILE)), 0};
    empty[t] = true;
    pack_transposed<P>(s.queries + t * at.query_tile, TILE, p.q.at<E>(task.b, head.seq.row_q + i0, task.h), p.q.row,
                       ranges[t].rows, ranges[t].lanes(), int(p.head_dim), int(at.units), s.keys);
  }

  const int64_t row_end = task.row + task.rows;
  for (int64_t j = span.next(task.row, row_end, 0); j < span.len_k; j = span.next(task.row, row_end, j)) {
    const int64_t j0 = j / KEYS * KEYS;
    j = j0 + KEYS;
    const int count = int(clamp(span.len_k - j0, 0, KEYS)), keys = int(round_up(count, ROWS));
    Pack<P>::rows(s.keys, at.units, p.k.at<E>(task.b, head.seq.row_k + j0, kv), p.k.row, count, keys, int(p.head_dim));
    Pack<P>::pairs(s.values, at.units_v, p.v.at<E>(task.b, head.seq.row_k + j0, kv), p.v.row, count, keys,
                   int(p.head_dim_v));
    for (int t = 0; t < tiles; ++t) {
      const int64_t soon = j0 + KEYS + int64_t(t) * KEYS / tiles, until = j0 + KEYS + int64_t(t + 1) * KEYS / tiles;
      const int fetch = int(clamp(until < span.len_k ? until - soon : span.len_k - soon, 0, KEYS));
      prefetch_rows(p.k.at<E>(task.b, head.seq.row_k + soon, kv), p.k.row, fetch, p.head_dim);
      prefetch_rows(p.v.at<E>(task.b, head.seq.row_k + soon, kv), p.v.row, fetch, p.head_dim_v);
      TileRange& range = ranges[t];
      range.j0 = j0;
      range.keys = count;
      Cover cover = span.cover(range.i0, range.i0 + range.rows, j0, j0 + count);
      if (cover == Cover::NONE) continue;
      if (keys > count) cover = Cover::SOME;
      product<P, Start::ZERO>(keys, range.vectors(), int(at.units), s.keys, at.units, 1, s.queries + t * at.query_tile,
                              TILE, s.scores, TILE);
      if (!head.is_scaled_product()) head.finish(range, s.scores, *s.score);
      if (cover == Cover::SOME) head.hide(range, s.scores, keys);
      softmax<P>(head, range, keys, s, s.peak + t * TILE, s.total + t * TILE, empty[t]);
      const typename P::unit* weights = P::STEP > 1 ? s.weights : (typename P::unit*)s.scores;
      float* out = s.out + t * at.out_tile;
      if (empty[t])
        product<P, Start::ZERO>(int(at.units_v), range.vectors(), keys / P::STEP, s.values, 1, at.units_v, weights,
                                TILE, out, TILE);
      else
        product<P, Start::SCALE>(int(at.units_v), range.vectors(), keys / P::STEP, s.values, 1, at.units_v, weights,
                                 TILE, out, TILE, s.rescale);
      empty[t] = false;
    }
  }
  for (int t = 0; t < tiles; ++t)
    finish_tile<P, E>(head, ranges[t], s.out + t * at.out_tile, s.peak + t * TILE, s.total + t * TILE, empty[t],
                      (float*)s.queries);
}

}  // namespace

const ForwardKernel forward = {TILE, TILES * TILE,
                               [](const Problem& p) {
                                 const size_t narrow = Scratch<Bf16Product>(p, nullptr).carver.bytes,
                                              wide = Scratch<Float32>(p, nullptr).carver.bytes;
                                 return narrow > wide ? narrow : wide;
                               },
                               [](const Problem& p, const ForwardTask& task, void* scratch) {
                                 switch (p.dtype) {
                                   case DType::FLOAT32: return forward_rows<Float32, float>(p, task, scratch);
                                   case DType::FLOAT16: return forward_rows<Float32, f16>(p, task, scratch);
                                   case DType::BFLOAT16: return forward_rows<Bf16Product, bf16>(p, task, scratch);
                                   case DType::BOOL: return;
                                 }
                               }};

}  // namespace duplex::DUPLEX_ISA
