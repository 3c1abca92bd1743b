// From products <q, k> to scores: scale, softcap, distance terms, bias and the span, on a tile of keys x queries.
#pragma once

#include "common/philox.h"
#include "common/problem.h"
#include "cpu/kernels/row_table.h"

namespace duplex::DUPLEX_ISA {

// Keys of a tile of scores at most; such tiles start at multiples of their size, counted from key 0 of the sequence.
constexpr int KEYS = 64;

// A tile: queries i0 .. i0 + rows (at most TILE), keys j0 .. j0 + keys (at most KEYS), stored as [key][TILE].
struct TileRange {
  int64_t i0, j0;
  int rows, keys;

  int vectors() const { return (rows + VECTORS_STEP * LANES - 1) / (VECTORS_STEP * LANES) * VECTORS_STEP; }
  int lanes() const { return vectors() * LANES; }  // of TILE, those that hold queries
};

struct ScoreScratch {
  float distance[TILE + KEYS];     // distance terms by query - key, see DistanceTerms
  float stored_bias[TILE * KEYS];  // [query][KEYS], as tensors have it
  float bias[KEYS * TILE];         // [key][TILE]
};

// The scores of one query head of one sequence.
struct HeadScores {
  const Problem& problem;
  Sequence seq;
  int64_t b, h;

  bool has_distance() const { return problem.distance_bias || problem.alibi_slopes; }
  bool has_bias() const { return problem.bias || problem.row_distance_bias || problem.col_distance_bias; }
  // Nothing but a positive scale stands between product and score: it is then folded into the exponential.
  bool is_scaled_product() const { return problem.softcap <= 0 && !has_distance() && !has_bias() && problem.scale > 0; }
  // What turns a stored score into natural units.
  float unit() const { return is_scaled_product() ? problem.scale : 1.0f; }

  float distance_term(int64_t d) const {
    float term = 0;
    if (problem.distance_bias) {
      const int64_t r = problem.radius;
      term += problem.distance_bias[h * (2 * r + 1) + clamp(d, -r, r) + r];
    }
    if (problem.alibi_slopes) term -= problem.alibi_slopes[h] * float(d < 0 ? -d : d);
    return term;
  }

  // terms[m - n + KEYS - 1] belongs to query i0 + m and key j0 + n: neighbouring queries are neighbours in the table.
  void fill_distance(const TileRange& t, float* terms) const {
    const int64_t nearest = t.j0 - (t.i0 + seq.span.offset);  // j - p(i) at m = n = 0
    for (int x = 0; x < TILE + KEYS; ++x) terms[x] = distance_term(nearest + KEYS - 1 - x);
  }

  template <class E>
  void widen_bias(const TileRange& t, float* to) const {
    const BiasView& v = problem.bias;
    const E* from =
        (const E*)v.data + b * v.batch + h * v.head + (seq.bias_row + t.i0) * v.row + (seq.bias_col + t.j0) * v.col;
    if (v.col == 1) {
      widen_rows(to, KEYS, from, v.row, t.rows, TILE, t.keys);
      return;
    }
    for (int m = 0; m < t.rows; ++m)
      for (int n = 0; n < t.keys; n += LANES) {
        E some[LANES] = {};
        for (int x = 0; x < LANES && n + x < t.keys; ++x) some[x] = from[m * v.row + (n + x) * v.col];
        store(to + m * KEYS + n, widen(some));
      }
  }
  void widen_mask(const TileRange& t, float* to) const {
    const BiasView& v = problem.bias;
    const uint8_t* from = (const uint8_t*)v.data + b * v.batch + h * v.head + (seq.bias_row + t.i0) * v.row +
                          (seq.bias_col + t.j0) * v.col;
    for (int m = 0; m < t.rows; ++m)
      for (int n = 0; n < t.keys; ++n) to[m * KEYS + n] = from[m * v.row + n * v.col] ? 0.0f : -INF;
  }
  void fill_dense_bias(const TileRange& t, float* to) const {
    switch (problem.bias.dtype) {
      case DType::FLOAT32: return widen_bias<float>(t, to);
      case DType::FLOAT16: return widen_bias<f16>(t, to);
      case DType::BFLOAT16: return widen_bias<bf16>(t, to);
      case DType::BOOL: return widen_mask(t, to);
    }
  }
  // j - p(i) of a tile's query m and key n.
  int64_t distance(const TileRange& t, int m, int n) const { return t.j0 + n - (t.i0 + m + seq.span.offset); }

  void add_row_table(const TileRange& t, float* to) const {
    const RowTable& table = problem.row_distance_bias;
    for (int m = 0; m < t.rows; ++m)
      with_row(table, b, h, t.i0 + m,
               [&](const auto* row) { add_distances(to + m * KEYS, table, row, distance(t, m, 0), t.keys); });
  }
  // Down a column of keys distances fall, so the last query comes first.
  void add_column_table(const TileRange& t, float* to) const {
    const RowTable& table = problem.col_distance_bias;
    const int last = t.rows - 1;
    for (int n = 0; n < t.keys; ++n) {
      float rising[TILE] = {};
      with_row(table, b, h, t.j0 + n,
               [&](const auto* row) { add_distances(rising, table, row, distance(t, last, n), t.rows); });
      for (int m = 0; m < t.rows; ++m) to[n * TILE + m] += rising[last - m];
    }
  }
  void fill_bias(const TileRange& t, ScoreScratch& scratch) const {
    if (!problem.bias || t.rows < TILE || t.keys < KEYS) memset(scratch.stored_bias, 0, sizeof scratch.stored_bias);
    if (problem.bias) fill_dense_bias(t, scratch.stored_bias);
    if (problem.row_distance_bias) add_row_table(t, scratch.stored_bias);
    transpose_units((uint32_t*)scratch.bias, TILE, (const uint32_t*)scratch.stored_bias, KEYS, TILE, KEYS);
    if (problem.col_distance_bias) add_column_table(t, scratch.bias);
  }

  // Scale, softcap, distance and biases. slopes, when given, receives d(score)/d(scaled product), 1 without softcap.
  void finish(const TileRange& t, float* scores, ScoreScratch& scratch, float* slopes = nullptr) const {
    const bool distances = has_distance(), biases = has_bias();
    if (distances) fill_distance(t, scratch.distance);
    if (biases) fill_bias(t, scratch);
    const float cap = problem.softcap;
    for (int n = 0; n < t.keys; ++n)
      for (int m = 0; m < t.lanes(); m += LANES) {
        vfloat s = load<vfloat>(scores + n * TILE + m) * problem.scale;
        if (cap > 0) {
          const vfloat bent = tanh(s * (1.0f / cap));
          s = bent * cap;
          if (slopes) store(slopes + n * TILE + m, 1.0f - bent * bent);
        }
        if (distances) s += load<vfloat>(scratch.distance + m - n + KEYS - 1);
        if (biases) s += load<vfloat>(scratch.bias + n * TILE + m);
        store(scores + n * TILE + m, s);
      }
  }

  // -inf where the span hides the key, and before key_begin; needed only where Span::cover says SOME.
  void hide(const TileRange& t, float* scores, int keys, int64_t key_begin = 0) const {
    const Span& span = seq.span;
    const auto relative = [&](int64_t j) { return int32_t(clamp(j - t.j0, -4 * KEYS, 4 * KEYS)); };
    const int32_t prefix = relative(span.prefix), begin = relative(key_begin), end = relative(t.j0 + t.keys);
    int32_t first[TILE], last[TILE];
    for (int m = 0; m < t.lanes(); ++m) {
      first[m] = relative(span.first(t.i0 + m));
      last[m] = relative(span.last(t.i0 + m));
    }
    for (int n = 0; n < keys; ++n)
      for (int m = 0; m < t.lanes(); m += LANES) {
        float* at = scores + n * TILE + m;
        const vint in_window = (load<vint>(first + m) <= n) & (n <= load<vint>(last + m));
        const vint seen = n >= end || n < begin ? vint{} : n < prefix ? ~vint{} : in_window;
        store(at, select(seen, load<vfloat>(at), splat(-INF)));
      }
  }

  // Zeroes what dropout drops. The kept ones are scaled once, in the row's final factor.
  void drop(const TileRange& t, float* weights) const {
    for (int n = 0; n < t.keys; n += 4)
      for (int m = 0; m < t.rows; ++m) {
        const PhiloxWords w =
            philox(problem.seed, uint32_t((t.j0 + n) / 4), uint32_t(t.i0 + m), uint32_t(h), uint32_t(b));
        for (int x = 0; x < 4; ++x)
          if (w.word[x] < problem.drop_below) weights[(n + x) * TILE + m] = 0;
      }
  }
};

}  // namespace duplex::DUPLEX_ISA
