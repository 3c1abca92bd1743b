// Recomputes one tile of softmax weights P and score gradients dS = P * (dP - delta) for the backward kernels.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/score.h"

namespace duplex::DUPLEX_ISA {

// Head dims as the products see them: units of a row, and floats of a row of an accumulator.
template <class P>
struct Widths {
  int units, units_v, floats, floats_v;

  explicit Widths(const Problem& p)
      : units(int(round_up(p.head_dim, P::STEP * P::DEPTH) / P::STEP)),
        units_v(int(round_up(p.head_dim_v, P::STEP * P::DEPTH) / P::STEP)),
        floats(int(round_up(p.head_dim, VECTORS_STEP * LANES))),
        floats_v(int(round_up(p.head_dim_v, VECTORS_STEP * LANES))) {}
};

// A tile of queries with what its gradient needs: transposes for the scores, pairs along the rows for dK and dV.
template <class P>
struct QueryTile {
  typename P::unit *q_t, *dout_t, *q_pairs, *dout_pairs, *staging;
  float *lse, *delta;  // lse is +inf for a row that saw nothing: its weights are then 0
  int64_t i0;
  int rows;

  QueryTile(const Problem& p, Carver& carver) {
    const Widths<P> w(p);
    q_t = carver.take<typename P::unit>(w.units * TILE);
    dout_t = carver.take<typename P::unit>(w.units_v * TILE);
    q_pairs = carver.take<typename P::unit>(TILE / P::STEP * w.floats);
    dout_pairs = carver.take<typename P::unit>(TILE / P::STEP * w.floats_v);
    staging = carver.take<typename P::unit>(TILE * (w.units > w.units_v ? w.units : w.units_v));
    lse = carver.take<float>(TILE);
    delta = carver.take<float>(TILE);
  }

  int lanes() const { return TileRange{i0, 0, rows, 0}.lanes(); }

  template <class E>
  void load_rows(const HeadScores& head, const Gradients& g, int64_t first, int count, bool for_keys) {
    const Problem& p = head.problem;
    const Widths<P> w(p);
    const int64_t row = head.seq.row_q + first;
    const E *q = p.q.at<E>(head.b, row, head.h), *dout = g.dout.at<E>(head.b, row, head.h);
    i0 = first;
    rows = count;
    const int lanes = this->lanes();
    pack_transposed<P>(q_t, TILE, q, p.q.row, rows, lanes, int(p.head_dim), w.units, staging);
    pack_transposed<P>(dout_t, TILE, dout, g.dout.row, rows, lanes, int(p.head_dim_v), w.units_v, staging);
    if (for_keys) {
      Pack<P>::pairs(q_pairs, w.floats, q, p.q.row, rows, lanes, int(p.head_dim));
      Pack<P>::pairs(dout_pairs, w.floats_v, dout, g.dout.row, rows, lanes, int(p.head_dim_v));
    }
    const int64_t at = head.b * p.lse_batch + head.h * p.lse_head + row;
    for (int m = 0; m < TILE; ++m) {
      const float given = m < rows ? p.lse[at + m] : -INF;
      lse[m] = given == -INF ? INF : given;
      delta[m] = given == -INF ? 0 : g.delta[at + m];
    }
  }
};

template <class P>
struct GradientTile {
  float *weights, *dscores, *slopes;  // [key][TILE]: dropped and scaled P; dS before softcap's slope and the scale
  ScoreScratch* score;

  GradientTile(const Problem&, Carver& carver)
      : weights(carver.take<float>(KEYS * TILE)),
        dscores(carver.take<float>(KEYS * TILE)),
        slopes(carver.take<float>(KEYS * TILE)),
        score(carver.take<ScoreScratch>(1)) {}

  // keys_rows, values_rows: KEYS rows of units as stored. keys: t.keys rounded up to P::ROW_STEP.
  void compute(const HeadScores& head, const QueryTile<P>& queries, const TileRange& t, int keys, Cover cover,
               const typename P::unit* keys_rows, const typename P::unit* values_rows) {
    const Problem& p = head.problem;
    const Widths<P> w(p);
    product<P, Start::ZERO>(keys, t.vectors(), w.units, keys_rows, w.units, 1, queries.q_t, TILE, weights, TILE);
    product<P, Start::ZERO>(keys, t.vectors(), w.units_v, values_rows, w.units_v, 1, queries.dout_t, TILE, dscores,
                            TILE);
    if (!head.is_scaled_product()) head.finish(t, weights, *score, slopes);
    if (p.softcap > 0)  // of keys that only fill the tile: not 0 * NaN
      memset(slopes + t.keys * TILE, 0, (keys - t.keys) * TILE * sizeof(float));
    if (cover == Cover::SOME) head.hide(t, weights, keys);
    if (p.dropout) head.drop(t, dscores);
    const float unit = head.unit(), keep = p.keep_scale;
    for (int m = 0; m < t.lanes(); m += LANES) {
      const vfloat lse = load<vfloat>(queries.lse + m), delta = load<vfloat>(queries.delta + m);
      for (int n = 0; n < keys; ++n) {
        float *weight = weights + n * TILE + m, *dscore = dscores + n * TILE + m;
        const vfloat probability = exp2<P::EXACT>((load<vfloat>(weight) * unit - lse) * LOG2E);
        store(dscore, probability * (load<vfloat>(dscore) * keep - delta));
        store(weight, probability * keep);
      }
    }
    if (p.dropout) head.drop(t, weights);
  }
};

}  // namespace duplex::DUPLEX_ISA
