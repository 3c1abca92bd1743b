// Forward attention over a block of queries, with the online softmax of FlashAttention-2 (arXiv 2307.08691).
//
// Scores are kept transposed, [key][query]: a vector holds one key and neighbouring queries. So maxima and sums need no
// work across lanes, keys and values enter the products as broadcasts of rows as they lie in memory, and only the
// queries are transposed, once a block.
#include "cpu/kernels/forward_tile.h"

namespace duplex::DUPLEX_ISA {
namespace {

// The tiles of one task against the keys that they see.
template <class P, class E, class Keys>
class Rows {
 public:
  Rows(const Problem& p, const ForwardTask& task, Scratch<P>& s, const Keys& source)
      : p(p),
        task(task),
        s(s),
        source(source),
        at(p),
        blocks((task.rows + TILE - 1) / TILE),
        tiles(blocks * task.heads) {
    for (int t = 0; t < tiles; ++t) {
      const int64_t first = t % blocks * TILE, i0 = task.row + first;
      ranges[t] = {i0, 0, int(clamp(task.rows - first, 0, TILE)), 0};
      begun[t] = summed[t] = false;
      pack_transposed<P>(s.queries + t * at.query_tile, TILE,
                         p.q.at<E>(task.b, task.seq.row_q + i0, task.h + t / blocks), p.q.row, ranges[t].rows,
                         ranges[t].lanes(), int(p.head_dim), int(at.units), s.keys);
    }
  }

  void run() {
    const Span& span = task.seq.span;
    const int64_t row_end = task.row + task.rows;
    const auto next = [&](int64_t j) { return span.next(task.row, row_end, j); };
    key_end = clamp(task.key_end, 0, span.len_k);
    for (int64_t j = next(task.key_begin); j < key_end; j = next(j)) {
      const int64_t j0 = j / PACKED * PACKED;
      j = j0 + PACKED;
      const int count = int(clamp(key_end - j0, 0, PACKED));
      pack(j0, count);
      attend(j0, count);
    }
    finish();
  }

 private:
  const Problem& p;
  const ForwardTask& task;
  Scratch<P>& s;
  const Keys& source;
  const Layout<P> at;
  const int blocks, tiles;
  int64_t key_end = 0;
  TileRange ranges[TILES];
  bool begun[TILES], summed[TILES];  // whether there is a peak and a total; an output

  HeadScores head_of(int t) const { return HeadScores{p, task.seq, task.b, task.h + t / blocks}; }
  int64_t kv_of(int t) const { return source.kv_heads() == 1 ? 0 : t / blocks / p.group(); }

  void pack(int64_t j0, int count) {
    const int padded = int(round_up(count, P::ROW_STEP));
    source.pack_keys(s.keys, at.units, j0, count, padded);
    source.pack_values(s.values, at.units_v, j0, count, padded);
    for (int n = 0; n < source.kv_heads(); ++n) {
      if constexpr (P::MATRIX) {
        const int64_t head = n * PACKED / P::STEP * at.units_v;
        transpose_units(s.values_t + head, PACKED / P::STEP, s.values + head, at.units_v, padded / P::STEP,
                        int(at.units_v));
      }
      if constexpr (Keys::SCALED) {
        source.scales(source.pages.k_scales, source.kv + n, s.k_scales + n * PACKED, j0, count, padded);
        source.scales(source.pages.v_scales, source.kv + n, s.v_scales + n * PACKED, j0, count, padded);
      }
    }
  }

  // A tile of queries and the keys from place `first` of the packed block on.
  struct Work {
    int tile, first, keys, padded;
    Cover cover;
  };

  // Of a block, in order; those where nothing is seen are left out.
  int works_of(int64_t j0, int count, Work* works) {
    const Span& span = task.seq.span;
    int n = 0;
    for (int t = 0; t < tiles; ++t)
      for (int first = 0; first < count; first += STRIP<P>) {
        const int keys = count - first < STRIP<P> ? count - first : STRIP<P>;
        const int64_t j = j0 + first, i0 = ranges[t].i0;
        Cover cover = j + keys <= task.key_begin ? Cover::NONE : span.cover(i0, i0 + ranges[t].rows, j, j + keys);
        if (cover == Cover::NONE) continue;
        const int padded = int(round_up(keys, P::ROW_STEP));
        if (padded > keys || j < task.key_begin) cover = Cover::SOME;
        works[n++] = {t, first, keys, padded, cover};
      }
    return n;
  }

  // Scores of one tile of queries and keys.
  void multiply_keys(const Work& w) const {
    product<P, Start::ZERO>(w.padded, ranges[w.tile].vectors(), int(at.units),
                            s.keys + (kv_of(w.tile) * PACKED + w.first) * at.units, at.units, 1,
                            s.queries + w.tile * at.query_tile, TILE, s.scores, TILE);
  }

  // Adds the values of keys [first, end) of the packed block.
  void multiply_values(int t, int first, int end, const typename P::unit* weights) {
    const int64_t head = kv_of(t) * PACKED / P::STEP * at.units_v, pair = first / P::STEP;
    const auto add = [&]<Start START>() {
      product<P, START>(int(at.units_v), ranges[t].vectors(), (end - first) / P::STEP,
                        P::MATRIX ? s.values_t + head + pair : s.values + head + pair * at.units_v,
                        P::MATRIX ? PACKED / P::STEP : 1, P::MATRIX ? 1 : at.units_v, weights, TILE,
                        s.out + t * at.out_tile, TILE, s.rescale);
    };
    if (!summed[t])
      add.template operator()<Start::ZERO>();
    else if constexpr (P::MATRIX)
      add.template operator()<Start::ADD>();
    else
      add.template operator()<Start::SCALE>();
    summed[t] = true;
  }

  // From scores to weights. Whether some peak has moved, so that old sums are to be multiplied by s.rescale.
  bool weigh(const Work& w, int64_t j0, typename P::unit* weights) {
    const int t = w.tile;
    const HeadScores head = head_of(t);
    const int64_t scale = kv_of(t) * PACKED + w.first;
    TileRange range = ranges[t];
    range.j0 = j0 + w.first;
    range.keys = w.keys;
    if constexpr (Keys::SCALED) rescale_keys(s.scores, range, s.k_scales + scale, w.padded);
    if (!head.is_scaled_product()) head.finish(range, s.scores, *s.score);
    if (w.cover == Cover::SOME) head.hide(range, s.scores, w.padded, task.key_begin);
    const bool first = !begun[t];
    begun[t] = true;
    return softmax<P>(head, range, w.padded, s, weights, s.peak + t * TILE, s.total + t * TILE, first,
                      Keys::SCALED ? s.v_scales + scale : nullptr);
  }

  // Asks for a share of the rows of the next block.
  void prefetch(int64_t j0, int n, int count) const {
    const int64_t from = j0 + PACKED + int64_t(n) * PACKED / count, to = j0 + PACKED + int64_t(n + 1) * PACKED / count;
    source.prefetch(from, int(clamp((to < key_end ? to : key_end) - from, 0, PACKED)));
  }

  void attend(int64_t j0, int count) {
    Work works[TILES * PACKED / STRIP<P>];
    const int n = works_of(j0, count, works);
    for (int x = 0, from = 0; x < n; ++x) {
      prefetch(j0, x, n);
      const Work& w = works[x];
      const int t = w.tile;
      multiply_keys(w);
      if constexpr (!P::MATRIX) {
        typename P::unit* weights = P::STEP > 1 ? s.weights : (typename P::unit*)s.scores;
        weigh(w, j0, weights);
        multiply_values(t, w.first, w.first + w.padded, weights);
      } else {
        // Weights wait for those of the tile's other keys of the block, while they are relative to the same peaks.
        const auto weights_of = [&](int key) { return s.weights + key / P::STEP * TILE; };
        const bool begins = x == 0 || works[x - 1].tile != t, ends = x + 1 == n || works[x + 1].tile != t;
        if (begins) from = w.first;
        if (!begins && works[x - 1].first + STRIP<P> != w.first) {
          multiply_values(t, from, works[x - 1].first + STRIP<P>, weights_of(from));
          from = w.first;
        }
        if (weigh(w, j0, weights_of(w.first))) {
          if (from < w.first) multiply_values(t, from, w.first, weights_of(from));
          from = w.first;
          if (summed[t]) scale_columns(int(at.units_v), ranges[t].vectors(), s.out + t * at.out_tile, TILE, s.rescale);
        }
        if (ends) multiply_values(t, from, w.first + w.padded, weights_of(from));
      }
    }
  }

  void finish() {
    for (int t = 0; t < tiles; ++t) {
      const HeadScores head = head_of(t);
      float *out = s.out + t * at.out_tile, *peak = s.peak + t * TILE, *total = s.total + t * TILE;
      const int64_t first = t % blocks * TILE, row = task.seq.row_q + task.row + first;
      if (task.slot < 0)
        finish_tile<P, E>(head, ranges[t], out, peak, total, !begun[t], p.out, row,
                          p.lse + task.b * p.lse_batch + head.h * p.lse_head + row, p.sink ? p.sink + head.h : nullptr);
      else
        finish_tile<P, float>(head, ranges[t], out, peak, total, !begun[t], p.parts, task.slot + first,
                              p.parts_lse + head.h * p.parts_lse_head + task.slot + first, nullptr);
    }
  }
};

template <class P, class E>
void forward_task(const Problem& p, const Pages* pages, const ForwardTask& task, void* memory) {
  [[maybe_unused]] typename P::Hold hold;
  const int64_t kv = task.h / p.group(), heads_kv = (task.heads + p.group() - 1) / p.group();
  Scratch<P> s(p, heads_kv, memory);
  if (!pages) {
    const DenseKeys<P, E> keys{p, task.b, task.seq.row_k, kv};
    return Rows<P, E, DenseKeys<P, E>>(p, task, s, keys).run();
  }
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
    Rows<P, E, PagedKeys<P, E, S>>(p, task, s, keys).run();
  };
  switch (pages->storage) {
    case Storage::AS_QUERIES: return run(E{});
    case Storage::INT8: return run(int8_t{});
    case Storage::FLOAT8_E4M3: return run(f8{});
  }
}

}  // namespace

const ForwardKernel forward = {TILE, TILES,
                               [](const Problem& p, int64_t heads_kv) {
                                 return p.dtype == DType::BFLOAT16
                                            ? Scratch<Bf16Product>(p, heads_kv, nullptr).carver.bytes
                                            : Scratch<Float32>(p, heads_kv, nullptr).carver.bytes;
                               },
                               [](const Problem& p, const Pages* pages, const ForwardTask& task, void* scratch) {
                                 switch (p.dtype) {
                                   case DType::BFLOAT16:
                                     return forward_task<Bf16Product, bf16>(p, pages, task, scratch);
#if !defined(DUPLEX_MATRIX_UNIT)
                                   case DType::FLOAT32: return forward_task<Float32, float>(p, pages, task, scratch);
                                   case DType::FLOAT16: return forward_task<Float32, f16>(p, pages, task, scratch);
#endif
                                   default: return;
                                 }
                               }};

}  // namespace duplex::DUPLEX_ISA
