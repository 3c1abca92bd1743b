// Forward attention over a block of queries, with the online softmax of FlashAttention-2 (arXiv 2307.08691).
//
// Scores are kept transposed, [key][query]: a vector holds one key and neighbouring queries. So maxima and sums need no
// work across lanes, keys and values enter the products as broadcasts of rows as they lie in memory, and only the
// queries are transposed, once a block.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/keys.h"
#include "cpu/kernels/score.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int TILES = 8;  // tiles of queries, of one head or several, that share one packed block of keys

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
    const int64_t rows = round_up(p.head_dim_v, LANES) * TILE;  // of the output, on their way out
    queries = carver.take<typename P::unit>(TILES * at.query_tile > rows ? TILES * at.query_tile : rows);
    const int64_t packed = heads_kv * KEYS;
    keys = carver.take<typename P::unit>((taller > packed ? taller : packed) * at.units);
    values = carver.take<typename P::unit>(packed / P::STEP * at.units_v + LANES);
    values_t = carver.take<typename P::unit>(P::MATRIX ? packed / P::STEP * at.units_v : 0);
    weights = carver.take<typename P::unit>(P::STEP > 1 ? KEYS / P::STEP * TILE : 0);
    out = carver.take<float>(TILES * at.out_tile);
    scores = carver.take<float>(KEYS * TILE);
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
void rescale_keys(float* scores, const TileRange& t, const float* scales, int keys) {
  for (int n = 0; n < keys; ++n)
    for (int m = 0; m < t.lanes(); m += LANES) {
      float* at = scores + n * TILE + m;
      store(at, load<vfloat>(at) * scales[n]);
    }
}

// Exponentials of one tile against the running peak; the sums go to `total`, the weights to the units of the product.
template <class P>
void softmax(const HeadScores& head, const TileRange& t, int keys, Scratch<P>& s, float* peak, float* total, bool first,
             const float* v_scales) {
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
  const bool dropout = head.problem.dropout, later = dropout || v_scales;  // weights change once more
  for (int n = 0; n < keys; n += 2)
    for (int x = 0; x < vectors; ++x) {
      float* at = s.scores + n * TILE + x * LANES;
      const vfloat even = exp2<P::EXACT>((load<vfloat>(at) - base[x]) * unit);
      const vfloat odd = exp2<P::EXACT>((load<vfloat>(at + TILE) - base[x]) * unit);
      sum[x] += even + odd;
      if constexpr (P::STEP == 2) {
        if (!later) {
          store_pairs(s.weights + n / 2 * TILE + x * LANES, even, odd);
          continue;
        }
      }
      store(at, even);
      store(at + TILE, odd);
    }
  for (int x = 0; x < vectors; ++x) store(total + x * LANES, sum[x]);
  if (!later) return;
  if (dropout) head.drop(t, s.scores);
  if (v_scales) rescale_keys(s.scores, t, v_scales, keys);
  if constexpr (P::STEP == 2)
    for (int n = 0; n < keys; n += 2)
      for (int m = 0; m < t.lanes(); m += LANES)
        store_pairs(s.weights + n / 2 * TILE + m, load<vfloat>(s.scores + n * TILE + m),
                    load<vfloat>(s.scores + (n + 1) * TILE + m));
}

// Divides by the sums and writes rows from `out_row` on; a row that saw nothing is 0 with lse -inf.
template <class P, class O>
void finish_tile(const HeadScores& head, const TileRange& t, float* out_t, float* peak, float* total, bool empty,
                 float* rows, const View& out, int64_t out_row, float* lse, const float* sink_of_head) {
  const Problem& p = head.problem;
  const int64_t dims = round_up(p.head_dim_v, LANES), units_v = Layout<P>(p).units_v;
  if (empty) memset(out_t, 0, Layout<P>(p).out_tile * sizeof(float));
  alignas(64) float factor[TILE];
  for (int m = 0; m < t.rows; ++m) {
    float top = empty ? -INF : peak[m] * head.unit(), sum = empty ? 0 : total[m], shrink = 1;
    if (top == -INF) sum = 0;
    if (sink_of_head) {
      const float sink = *sink_of_head, higher = sink > top ? sink : top;
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
  transpose_units((uint32_t*)rows, dims, (const uint32_t*)out_t, TILE, int(units_v < dims ? units_v : dims), t.lanes());
  for (int m = 0; m < t.rows; ++m) {
    O* to = out.at<O>(head.b, out_row + m, head.h);
    const float* from = rows + m * dims;
    if (factor[m] == 0) {  // not by multiplication: 0 * NaN
      memset(to, 0, p.head_dim_v * sizeof(O));
      continue;
    }
    int x = 0;
    for (; x + LANES <= p.head_dim_v; x += LANES) narrow(to + x, load<vfloat>(from + x) * factor[m]);
    if (x < p.head_dim_v) narrow_partial(to + x, load<vfloat>(from + x) * factor[m], int(p.head_dim_v - x));
  }
}

template <class P, class E, class Keys>
void forward_rows(const Problem& p, const ForwardTask& task, Scratch<P>& s, const Keys& source) {
  const Layout<P> at(p);
  const Span& span = task.seq.span;
  const int blocks = (task.rows + TILE - 1) / TILE, tiles = blocks * task.heads;
  bool empty[TILES];
  TileRange ranges[TILES];
  const auto head_of = [&](int t) { return HeadScores{p, task.seq, task.b, task.h + t / blocks}; };
  for (int t = 0; t < tiles; ++t) {
    const int64_t first = t % blocks * TILE, i0 = task.row + first;
    ranges[t] = {i0, 0, int(clamp(task.rows - first, 0, TILE)), 0};
    empty[t] = true;
    pack_transposed<P>(s.queries + t * at.query_tile, TILE, p.q.at<E>(task.b, task.seq.row_q + i0, task.h + t / blocks),
                       p.q.row, ranges[t].rows, ranges[t].lanes(), int(p.head_dim), int(at.units), s.keys);
  }

  const int64_t row_end = task.row + task.rows, key_end = clamp(task.key_end, 0, span.len_k);
  const auto next = [&](int64_t j) { return span.next(task.row, row_end, j); };
  for (int64_t j = next(task.key_begin); j < key_end; j = next(j)) {
    const int64_t j0 = j / KEYS * KEYS;
    j = j0 + KEYS;
    const int count = int(clamp(key_end - j0, 0, KEYS)), keys = int(round_up(count, P::ROW_STEP));
    source.pack_keys(s.keys, at.units, j0, count, keys);
    source.pack_values(s.values, at.units_v, j0, count, keys);
    if constexpr (P::MATRIX)
      for (int n = 0; n < source.kv_heads(); ++n) {
        const int64_t head = n * KEYS / P::STEP * at.units_v;
        transpose_units(s.values_t + head, KEYS / P::STEP, s.values + head, at.units_v, keys / P::STEP, int(at.units_v));
      }
    if constexpr (Keys::SCALED)
      for (int n = 0; n < source.kv_heads(); ++n) {
        source.scales(source.pages.k_scales, source.kv + n, s.k_scales + n * KEYS, j0, count, keys);
        source.scales(source.pages.v_scales, source.kv + n, s.v_scales + n * KEYS, j0, count, keys);
      }
    for (int t = 0; t < tiles; ++t) {
      const int64_t soon = j0 + KEYS + int64_t(t) * KEYS / tiles, until = j0 + KEYS + int64_t(t + 1) * KEYS / tiles;
      source.prefetch(soon, int(clamp((until < key_end ? until : key_end) - soon, 0, KEYS)));
      TileRange& range = ranges[t];
      range.j0 = j0;
      range.keys = count;
      Cover cover = span.cover(range.i0, range.i0 + range.rows, j0, j0 + count);
      if (cover == Cover::NONE) continue;
      const HeadScores head = head_of(t);
      const int64_t kv = source.kv_heads() == 1 ? 0 : t / blocks / p.group();
      if (keys > count || j0 < task.key_begin) cover = Cover::SOME;
      product<P, Start::ZERO>(keys, range.vectors(), int(at.units), s.keys + kv * KEYS * at.units, at.units, 1,
                              s.queries + t * at.query_tile, TILE, s.scores, TILE);
      if constexpr (Keys::SCALED) rescale_keys(s.scores, range, s.k_scales + kv * KEYS, keys);
      if (!head.is_scaled_product()) head.finish(range, s.scores, *s.score);
      if (cover == Cover::SOME) head.hide(range, s.scores, keys, task.key_begin);
      softmax<P>(head, range, keys, s, s.peak + t * TILE, s.total + t * TILE, empty[t],
                 Keys::SCALED ? s.v_scales + kv * KEYS : nullptr);
      const typename P::unit* weights = P::STEP > 1 ? s.weights : (typename P::unit*)s.scores;
      const typename P::unit* values = (P::MATRIX ? s.values_t : s.values) + kv * KEYS / P::STEP * at.units_v;
      const int64_t value_row = P::MATRIX ? KEYS / P::STEP : 1, value_step = P::MATRIX ? 1 : at.units_v;
      float* out = s.out + t * at.out_tile;
      if (empty[t])
        product<P, Start::ZERO>(int(at.units_v), range.vectors(), keys / P::STEP, values, value_row, value_step,
                                weights, TILE, out, TILE);
      else
        product<P, Start::SCALE>(int(at.units_v), range.vectors(), keys / P::STEP, values, value_row, value_step,
                                 weights, TILE, out, TILE, s.rescale);
      empty[t] = false;
    }
  }
  for (int t = 0; t < tiles; ++t) {
    const HeadScores head = head_of(t);
    float *out = s.out + t * at.out_tile, *peak = s.peak + t * TILE, *total = s.total + t * TILE;
    const int64_t first = t % blocks * TILE, row = task.seq.row_q + task.row + first;
    if (task.slot < 0)
      finish_tile<P, E>(head, ranges[t], out, peak, total, empty[t], (float*)s.queries, p.out, row,
                        p.lse + task.b * p.lse_batch + head.h * p.lse_head + row, p.sink ? p.sink + head.h : nullptr);
    else
      finish_tile<P, float>(head, ranges[t], out, peak, total, empty[t], (float*)s.queries, p.parts, task.slot + first,
                            p.parts_lse + head.h * p.parts_lse_head + task.slot + first, nullptr);
  }
}

template <class P, class E>
void forward_task(const Problem& p, const Pages* pages, const ForwardTask& task, void* memory) {
  [[maybe_unused]] const typename P::Hold hold;
  const int64_t kv = task.h / p.group(), heads_kv = (task.heads + p.group() - 1) / p.group();
  Scratch<P> s(p, heads_kv, memory);
  if (!pages) return forward_rows<P, E>(p, task, s, DenseKeys<P, E>{p, task.b, task.seq.row_k, kv});
  const Span& span = task.seq.span;
  const auto run = [&]<class S>(S) {
    const int32_t* table = pages->table + task.b * pages->table_row;
    const PagedKeys<P, E, S> keys{p,
                                  *pages,
                                  table,
                                  kv,
                                  heads_kv,
                                  static_cast<E*>(s.stage),
                                  span.prefix,
                                  span.first(task.row),
                                  span.last(task.row + task.rows - 1) + 1};
    forward_rows<P, E>(p, task, s, keys);
  };
  switch (pages->storage) {
    case Storage::AS_QUERIES: return run(E{});
    case Storage::INT8: return run(int8_t{});
    case Storage::FLOAT8_E4M3: return run(f8{});
  }
}

}  // namespace

const ForwardKernel forward = {
    TILE, TILES,
    [](const Problem& p, int64_t heads_kv) {
      return p.dtype == DType::BFLOAT16 ? Scratch<Bf16Product>(p, heads_kv, nullptr).carver.bytes
                                        : Scratch<Float32>(p, heads_kv, nullptr).carver.bytes;
    },
    [](const Problem& p, const Pages* pages, const ForwardTask& task, void* scratch) {
      switch (p.dtype) {
        case DType::BFLOAT16: return forward_task<Bf16Product, bf16>(p, pages, task, scratch);
#if !defined(DUPLEX_MATRIX_UNIT)
        case DType::FLOAT32: return forward_task<Float32, float>(p, pages, task, scratch);
        case DType::FLOAT16: return forward_task<Float32, f16>(p, pages, task, scratch);
#endif
        default: return;
      }
    }};

}  // namespace duplex::DUPLEX_ISA
