// Backward attention for one kv head (or a range of its keys or queries), after FlashAttention-2 (arXiv 2307.08691):
// weights are recomputed from lse; a block of keys stays while all queries that see it pass by.
//
// dK and dV collect in the block, dQ in float32: in the tensor itself when it is float32, else in `dq_sum`. The order
// of all sums is fixed, so the result is deterministic.
#include "cpu/kernels/gradient_tile.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int BLOCK = 3 * KEYS;  // keys that stay

#if defined(__AVX512BF16__)
inline void store_bf16(uint32_t* to, vfloat v) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  memcpy(to, &narrow, sizeof narrow);
}
#endif

template <class P>
struct Scratch {
  typedef typename P::unit unit;
  Carver carver;
  Widths<P> w;
  unit *keys, *key_pairs, *values;         // [BLOCK][units], [BLOCK / STEP][floats], [BLOCK][units_v]
  unit* key_pairs_t;                       // [floats][BLOCK / STEP], for the matrix unit
  float *dk, *dv, *dq, *dq_t;              // [BLOCK][floats], [BLOCK][floats_v], [TILE][floats], [floats][TILE]
  unit *weights, *dscores, *dscore_pairs;  // of the products: [KEYS][TILE / STEP] twice, [KEYS / STEP][TILE]
  float* diagonals;
  float* column_ends;  // [BLOCK][2]
  QueryTile<P> queries;
  GradientTile<P> tile;

  Scratch(const Problem& p, void* base)
      : carver{(char*)base},
        w(p),
        keys(carver.take<unit>(BLOCK * w.units)),
        key_pairs(carver.take<unit>(BLOCK / P::STEP * w.floats)),
        values(carver.take<unit>(BLOCK * w.units_v)),
        key_pairs_t(carver.take<unit>(P::MATRIX ? BLOCK / P::STEP * w.floats : 0)),
        dk(carver.take<float>(BLOCK * w.floats)),
        dv(carver.take<float>(BLOCK * w.floats_v)),
        dq(carver.take<float>(TILE * w.floats)),
        dq_t(carver.take<float>(P::MATRIX ? TILE * w.floats : 0)),
        weights(carver.take<unit>(KEYS * TILE / P::STEP)),
        dscores(carver.take<unit>(KEYS * TILE / P::STEP)),
        dscore_pairs(carver.take<unit>(KEYS * TILE / P::STEP)),
        diagonals(carver.take<float>(TILE + KEYS)),
        column_ends(carver.take<float>(p.col_distance_bias ? BLOCK * 2 : 0)),
        queries(p, carver),
        tile(p, carver) {}
};

// The units of the three products from the float tile; dS takes softcap's slope and the scale on the way.
template <class P>
void make_units(const HeadScores& head, const TileRange& t, Scratch<P>& s, int keys) {
  const bool bent = head.problem.softcap > 0;
  const float scale = head.problem.scale;
  for (int n = 0; n < keys; n += 2)
    for (int m = 0; m < t.lanes(); m += LANES) {
      const int even_at = n * TILE + m, odd_at = even_at + TILE;
      vfloat even = load<vfloat>(s.tile.dscores + even_at) * scale, odd = load<vfloat>(s.tile.dscores + odd_at) * scale;
      if (bent) {
        even *= load<vfloat>(s.tile.slopes + even_at);
        odd *= load<vfloat>(s.tile.slopes + odd_at);
      }
      if constexpr (P::STEP == 1) {
        store(s.tile.dscores + even_at, even);
        store(s.tile.dscores + odd_at, odd);
      } else {
        store_bf16(s.dscores + even_at / 2, even);
        store_bf16(s.dscores + odd_at / 2, odd);
        store_pairs(s.dscore_pairs + n / 2 * TILE + m, even, odd);
        store_bf16(s.weights + even_at / 2, load<vfloat>(s.tile.weights + even_at));
        store_bf16(s.weights + odd_at / 2, load<vfloat>(s.tile.weights + odd_at));
      }
    }
}

// dS summed along diagonals (equal key - query), then into the head's table.
template <class P>
void add_distance_gradient(const HeadScores& head, const TileRange& t, Scratch<P>& s, float* table) {
  memset(s.diagonals, 0, (TILE + KEYS) * sizeof(float));
  for (int n = 0; n < t.keys; ++n)
    for (int m = 0; m < t.lanes(); m += LANES) {
      float* at = s.diagonals + m - n + KEYS - 1;
      store(at, load<vfloat>(at) + load<vfloat>(s.tile.dscores + n * TILE + m));
    }
  const int64_t nearest = t.j0 - (t.i0 + head.seq.span.offset), r = head.problem.radius;
  for (int x = 0; x < TILE + KEYS; ++x) table[clamp(nearest + KEYS - 1 - x, -r, r) + r] += s.diagonals[x];
}

// dS of a tile into the gradients of the tables that have a row for each of its queries, or of its keys.
template <class P>
void write_row_table(const HeadScores& head, const TileRange& t, Scratch<P>& s, const RowTable& to, float* ends) {
  float* const by_query = s.tile.score->stored_bias;  // [query][KEYS]
  transpose_units((uint32_t*)by_query, KEYS, (const uint32_t*)s.tile.dscores, TILE, int(round_up(t.keys, LANES)),
                  int(round_up(t.rows, LANES)));
  for (int m = 0; m < t.rows; ++m)
    with_row(to, head.b, head.h, t.i0 + m, [&](auto* row) {
      write_distances(by_query + m * KEYS, to, row, head.distance(t, m, 0), t.keys, ends + 2 * m);
    });
}

template <class P>
void write_column_table(const HeadScores& head, const TileRange& t, Scratch<P>& s, const RowTable& to, float* ends) {
  const int last = t.rows - 1;
  for (int n = 0; n < t.keys; ++n) {
    float rising[TILE];
    for (int m = 0; m < t.rows; ++m) rising[last - m] = s.tile.dscores[n * TILE + m];
    with_row(to, head.b, head.h, t.j0 + n,
             [&](auto* row) { write_distances(rising, to, row, head.distance(t, last, n), t.rows, ends + 2 * n); });
  }
}

void write_table_ends(const RowTable& to, int64_t b, int64_t h, int64_t first, int64_t count, const float* ends) {
  for (int64_t r = 0; r < count; ++r)
    with_row(to, b, h, first + r, [&](auto* row) { write_ends(to, row, ends + 2 * r); });
}

// to[r][x] += from[r][x]
inline void add_rows(float* to, int64_t to_row, const float* from, int64_t from_row, int rows, int dim) {
  for (int r = 0; r < rows; ++r)
    for (int x = 0; x < dim; ++x) to[r * to_row + x] += from[r * from_row + x];
}

template <class E>
void narrow_rows(E* to, int64_t to_row, const float* from, int64_t from_row, int rows, int dim) {
  for (int r = 0; r < rows; ++r, to += to_row, from += from_row) {
    int x = 0;
    for (; x + LANES <= dim; x += LANES) narrow(to + x, load<vfloat>(from + x));
    if (x < dim) narrow_partial(to + x, widen_partial(from + x, dim - x), dim - x);
  }
}

template <class P, class E>
void backward_block(const Problem& p, const Gradients& g, const BackwardTask& task, const Sequence& seq, Scratch<P>& s,
                    int64_t begin, int count) {
  const Widths<P>& w = s.w;
  const int64_t group = p.group(), d = p.head_dim, dv = p.head_dim_v, row_k = seq.row_k + begin;
  const int padded = int(round_up(count, KEYS));
  const E *k = p.k.at<E>(task.b, row_k, task.h_kv), *v = p.v.at<E>(task.b, row_k, task.h_kv);
  Pack<P>::rows(s.keys, w.units, k, p.k.row, count, padded, int(d));
  Pack<P>::rows(s.values, w.units_v, v, p.v.row, count, padded, int(dv));
  if (task.queries) Pack<P>::pairs(s.key_pairs, w.floats, k, p.k.row, count, padded, int(d));
  if constexpr (P::MATRIX)
    if (task.queries)
      transpose_units(s.key_pairs_t, BLOCK / P::STEP, s.key_pairs, w.floats, padded / P::STEP, w.floats);
  if (task.keys) {
    memset(s.dk, 0, padded * w.floats * sizeof(float));
    memset(s.dv, 0, padded * w.floats_v * sizeof(float));
  }
  for (int64_t x = 0; x < group; ++x) {
    const HeadScores head{p, seq, task.b, task.h_kv * group + x};
    if (g.dcol_distance) memset(s.column_ends, 0, BLOCK * 2 * sizeof(float));
    for (int64_t i0 = task.row_begin; i0 < task.row_end; i0 += TILE) {
      const int rows = int(clamp(task.row_end - i0, 0, TILE));
      if (seq.span.cover(i0, i0 + rows, begin, begin + count) == Cover::NONE) continue;
      s.queries.template load_rows<E>(head, g, i0, rows, task.keys);
      bool first = true;
      for (int at = 0; at < count; at += KEYS) {
        const TileRange t{i0, begin + at, rows, int(clamp(count - at, 0, KEYS))};
        const int keys = int(round_up(t.keys, P::ROW_STEP));
        Cover cover = seq.span.cover(i0, i0 + rows, t.j0, t.j0 + t.keys);
        if (cover == Cover::NONE) continue;
        if (keys > t.keys) cover = Cover::SOME;
        s.tile.compute(head, s.queries, t, keys, cover, s.keys + at * w.units, s.values + at * w.units_v);
        if (g.ddistance)
          add_distance_gradient(head, t, s, g.ddistance + (head.b * p.heads_q + head.h) * (2 * p.radius + 1));
        if (g.drow_distance && task.queries)
          write_row_table(head, t, s, g.drow_distance,
                          g.row_ends + 2 * (x * (task.row_end - task.row_begin) + i0 - task.row_begin));
        if (g.dcol_distance && task.keys) write_column_table(head, t, s, g.dcol_distance, s.column_ends + 2 * at);
        make_units(head, t, s, keys);
        typedef typename P::unit unit;
        const unit* weights = P::STEP == 1 ? (unit*)s.tile.weights : s.weights;
        const unit* dscores = P::STEP == 1 ? (unit*)s.tile.dscores : s.dscores;
        const unit* dscore_pairs = P::STEP == 1 ? (unit*)s.tile.dscores : s.dscore_pairs;
        constexpr int ROW = TILE / P::STEP;  // units of a key
        const int steps = t.lanes() / P::STEP;
        if (task.keys) {
          product<P, Start::ADD>(keys, w.floats_v / LANES, steps, weights, ROW, 1, s.queries.dout_pairs, w.floats_v,
                                 s.dv + at * w.floats_v, w.floats_v);
          product<P, Start::ADD>(keys, w.floats / LANES, steps, dscores, ROW, 1, s.queries.q_pairs, w.floats,
                                 s.dk + at * w.floats, w.floats);
        }
        if (task.queries) {
          const auto add = [&]<Start START>() {
            if constexpr (P::MATRIX)  // dq^T: its pairs of keys lie side by side only in the keys' transpose
              product<P, START>(w.floats, t.vectors(), keys / P::STEP, s.key_pairs_t + at / P::STEP, BLOCK / P::STEP, 1,
                                dscore_pairs, TILE, s.dq_t, TILE);
            else
              product<P, START>(t.lanes(), w.floats / LANES, keys / P::STEP, dscore_pairs, 1, TILE,
                                s.key_pairs + at / P::STEP * w.floats, w.floats, s.dq, w.floats);
          };
          first ? add.template operator()<Start::ZERO>() : add.template operator()<Start::ADD>();
        }
        first = false;
      }
      if (task.queries && !first) {
        if constexpr (P::MATRIX)
          transpose_units((uint32_t*)s.dq, w.floats, (const uint32_t*)s.dq_t, TILE, w.floats, s.queries.lanes());
        if (g.dq_sum)
          add_rows(g.dq_sum + (x * (task.row_end - task.row_begin) + i0 - task.row_begin) * d, d, s.dq, w.floats, rows,
                   int(d));
        else
          add_rows(g.dq.at<float>(task.b, seq.row_q + i0, head.h), g.dq.row, s.dq, w.floats, rows, int(d));
      }
    }
    if (g.dcol_distance && task.keys) write_table_ends(g.dcol_distance, head.b, head.h, begin, count, s.column_ends);
  }
  if (task.keys) {
    narrow_rows(g.dk.at<E>(task.b, row_k, task.h_kv), g.dk.row, s.dk, w.floats, count, int(d));
    narrow_rows(g.dv.at<E>(task.b, row_k, task.h_kv), g.dv.row, s.dv, w.floats_v, count, int(dv));
  }
}

template <class P, class E>
void backward_task(const Problem& p, const Gradients& given, const BackwardTask& task, void* memory) {
  [[maybe_unused]] typename P::Hold hold;
  Scratch<P> s(p, memory);
  const Sequence seq = sequence(p, task.b);
  const int64_t rows = task.row_end - task.row_begin, group = p.group(), d = p.head_dim;
  Gradients g = given;
  if (task.queries) {
    g.dq_sum = p.dtype == DType::FLOAT32 ? nullptr : s.carver.template take<float>(group * rows * d);
    if (g.dq_sum) memset(g.dq_sum, 0, group * rows * d * sizeof(float));
    for (int64_t x = 0; x < group && !g.dq_sum; ++x)
      for (int64_t r = 0; r < rows; ++r)
        memset(g.dq.at<float>(task.b, seq.row_q + task.row_begin + r, task.h_kv * group + x), 0, d * sizeof(float));
  }
  if (g.drow_distance && task.queries) {
    g.row_ends = s.carver.template take<float>(group * rows * 2);
    memset(g.row_ends, 0, group * rows * 2 * sizeof(float));
  }
  for (int64_t j = task.key_begin; j < task.key_end; j += BLOCK)
    backward_block<P, E>(p, g, task, seq, s, j, int(clamp(task.key_end - j, 0, BLOCK)));
  if (task.queries && g.dq_sum)
    for (int64_t x = 0; x < group; ++x)
      narrow_rows(g.dq.at<E>(task.b, seq.row_q + task.row_begin, task.h_kv * group + x), g.dq.row,
                  g.dq_sum + x * rows * d, d, int(rows), int(d));
  if (g.row_ends)
    for (int64_t x = 0; x < group; ++x)
      write_table_ends(g.drow_distance, task.b, task.h_kv * group + x, task.row_begin, rows, g.row_ends + 2 * x * rows);
}

template <class E>
void row_deltas(const Problem& p, const View& dout, const float* dlse, float* delta, int64_t b, int64_t h) {
  const Sequence seq = sequence(p, b);
  const int64_t at = b * p.lse_batch + h * p.lse_head + seq.row_q;
  const int d = int(p.head_dim_v);
  for (int64_t i = 0; i < seq.len_q; ++i) {
    const E *o = p.out.at<E>(b, seq.row_q + i, h), *g = dout.at<E>(b, seq.row_q + i, h);
    vfloat total{};
    int x = 0;
    for (; x + LANES <= d; x += LANES) total += widen(o + x) * widen(g + x);
    if (x < d) total += widen_partial(o + x, d - x) * widen_partial(g + x, d - x);
    delta[at + i] = sum(total) - (dlse ? dlse[at + i] : 0.0f);
  }
}

}  // namespace

const BackwardKernel backward = {
    TILE, BLOCK,
    [](const Problem& p, int64_t rows) {
      size_t bytes = p.dtype == DType::BFLOAT16 ? Scratch<Bf16Product>(p, nullptr).carver.bytes
                                                : Scratch<Float32>(p, nullptr).carver.bytes;
      if (p.dtype != DType::FLOAT32) bytes += p.group() * rows * p.head_dim * sizeof(float) + 128;
      if (p.row_distance_bias) bytes += p.group() * rows * 2 * sizeof(float) + 128;
      return bytes;
    },
    [](const Problem& p, const View& dout, const float* dlse, float* delta, int64_t b, int64_t h) {
      switch (p.dtype) {
        case DType::FLOAT32: return row_deltas<float>(p, dout, dlse, delta, b, h);
        case DType::FLOAT16: return row_deltas<f16>(p, dout, dlse, delta, b, h);
        case DType::BFLOAT16: return row_deltas<bf16>(p, dout, dlse, delta, b, h);
        case DType::BOOL: return;
      }
    },
    [](const Problem& p, const Gradients& g, const BackwardTask& task, void* scratch) {
      switch (p.dtype) {
        case DType::BFLOAT16: return backward_task<Bf16Product, bf16>(p, g, task, scratch);
#if !defined(DUPLEX_MATRIX_UNIT)
        case DType::FLOAT32: return backward_task<Float32, float>(p, g, task, scratch);
        case DType::FLOAT16: return backward_task<Float32, f16>(p, g, task, scratch);
#endif
        default: return;
      }
    }};

}  // namespace duplex::DUPLEX_ISA
