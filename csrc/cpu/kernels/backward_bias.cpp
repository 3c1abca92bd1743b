// The gradient of a dense bias. It is as large as the scores, or is shared by several heads and sequences: so a task
// owns a part of it and recomputes the scores of everyone who read that part, in a fixed order and with no atomics.
#include "cpu/kernels/gradient_tile.h"

namespace duplex::DUPLEX_ISA {
namespace {

constexpr int ROWS_AT_MOST = 2 * TILE, KEYS_AT_MOST = 4 * KEYS;  // of the part a task owns, where not broadcast

template <class P>
struct Scratch {
  Carver carver;
  Widths<P> w;
  typename P::unit *keys, *values;
  float* sums;  // the part: rows x columns, 1 where broadcast
  QueryTile<P> queries;
  GradientTile<P> tile;

  Scratch(const Problem& p, void* base)
      : carver{(char*)base},
        w(p),
        keys(carver.take<typename P::unit>(KEYS * w.units)),
        values(carver.take<typename P::unit>(KEYS * w.units_v)),
        sums(carver.take<float>(ROWS_AT_MOST * KEYS_AT_MOST)),
        queries(p, carver),
        tile(p, carver) {}
};

// Adds what one head of one sequence contributes to the part.
template <class P, class E>
void add_head(const HeadScores& head, const Gradients& g, const BiasTask& task, Scratch<P>& s, int64_t sum_row,
              int64_t sum_col) {
  const Problem& p = head.problem;
  const Sequence& seq = head.seq;
  const int64_t kv = head.h / p.group();
  const int64_t i_begin = clamp(task.row_begin - seq.bias_row, 0, seq.len_q);
  const int64_t i_end = clamp(task.row_end - seq.bias_row, 0, seq.len_q);
  const int64_t j_begin = clamp(task.key_begin - seq.bias_col, 0, seq.len_k);
  const int64_t j_end = clamp(task.key_end - seq.bias_col, 0, seq.len_k);
  for (int64_t i0 = i_begin / TILE * TILE; i0 < i_end; i0 += TILE) {
    const int rows = int(clamp(seq.len_q - i0, 0, TILE));
    s.queries.template load_rows<E>(head, g, i0, rows, false);
    for (int64_t j0 = j_begin / KEYS * KEYS; j0 < j_end; j0 += KEYS) {
      const TileRange t{i0, j0, rows, int(clamp(seq.len_k - j0, 0, KEYS))};
      const int keys = int(round_up(t.keys, P::ROW_STEP));
      Cover cover = seq.span.cover(i0, i0 + rows, j0, j0 + t.keys);
      if (cover == Cover::NONE) continue;
      if (keys > t.keys) cover = Cover::SOME;
      const int64_t row_k = seq.row_k + j0;
      Pack<P>::rows(s.keys, s.w.units, p.k.at<E>(head.b, row_k, kv), p.k.row, t.keys, keys, int(p.head_dim));
      Pack<P>::rows(s.values, s.w.units_v, p.v.at<E>(head.b, row_k, kv), p.v.row, t.keys, keys, int(p.head_dim_v));
      s.tile.compute(head, s.queries, t, keys, cover, s.keys, s.values);
      const int m_begin = int(clamp(i_begin - i0, 0, rows)), m_end = int(clamp(i_end - i0, 0, rows));
      const int n_begin = int(clamp(j_begin - j0, 0, t.keys)), n_end = int(clamp(j_end - j0, 0, t.keys));
      for (int m = m_begin; m < m_end; ++m)
        for (int n = n_begin; n < n_end; ++n)
          s.sums[(i0 + m + seq.bias_row - task.row_begin) * sum_row +
                 (j0 + n + seq.bias_col - task.key_begin) * sum_col] += s.tile.dscores[n * TILE + m];
    }
  }
}

template <class B>
void write_part(const BiasView& to, const BiasTask& task, const float* sums, int64_t sum_row, int64_t sum_col) {
  B* base = (B*)to.data + task.b * to.batch + task.h * to.head;
  const int64_t rows = to.row ? task.row_end - task.row_begin : 1, cols = to.col ? task.key_end - task.key_begin : 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      narrow_partial(base + (to.row ? task.row_begin + r : 0) * to.row + (to.col ? task.key_begin + c : 0) * to.col,
                     splat(sums[r * sum_row + c * sum_col]), 1);
}

template <class P, class E>
void bias_part(const Problem& p, const Gradients& g, const BiasView& dbias, const BiasTask& task, void* memory) {
  Scratch<P> s(p, memory);
  const int64_t sum_row = dbias.row ? KEYS_AT_MOST : 0, sum_col = dbias.col ? 1 : 0;
  memset(s.sums, 0, ROWS_AT_MOST * KEYS_AT_MOST * sizeof(float));
  const int64_t b_end = dbias.batch ? task.b + 1 : p.batch, h_end = dbias.head ? task.h + 1 : p.heads_q;
  for (int64_t b = dbias.batch ? task.b : 0; b < b_end; ++b) {
    const Sequence seq = sequence(p, b);
    for (int64_t h = dbias.head ? task.h : 0; h < h_end; ++h)
      add_head<P, E>(HeadScores{p, seq, b, h}, g, task, s, sum_row, sum_col);
  }
  switch (dbias.dtype) {
    case DType::FLOAT32: return write_part<float>(dbias, task, s.sums, sum_row, sum_col);
    case DType::FLOAT16: return write_part<f16>(dbias, task, s.sums, sum_row, sum_col);
    case DType::BFLOAT16: return write_part<bf16>(dbias, task, s.sums, sum_row, sum_col);
    case DType::BOOL: return;
  }
}

}  // namespace

const BiasKernel bias = {
    ROWS_AT_MOST, KEYS_AT_MOST,
    [](const Problem& p) {
      return p.dtype == DType::BFLOAT16 ? Scratch<Bf16Product>(p, nullptr).carver.bytes
                                        : Scratch<Float32>(p, nullptr).carver.bytes;
    },
    [](const Problem& p, const Gradients& g, const BiasView& dbias, const BiasTask& task, void* scratch) {
      switch (p.dtype) {
        case DType::FLOAT32: return bias_part<Float32, float>(p, g, dbias, task, scratch);
        case DType::FLOAT16: return bias_part<Float32, f16>(p, g, dbias, task, scratch);
        case DType::BFLOAT16: return bias_part<Bf16Product, bf16>(p, g, dbias, task, scratch);
        case DType::BOOL: return;
      }
    }};

}  // namespace duplex::DUPLEX_ISA
