// The exact union of attentions of one row over disjoint keys: each part weighted by exp(lse_part - lse).
#pragma once

#include <math.h>

#include "cuda/lanes.cuh"

namespace duplex {

// Runs that a lane has, of a row of at most 256 numbers.
template <int COUNT>
constexpr int MERGE_RUNS = COUNT > 1 ? 2 : 8;
constexpr int MERGE_AT_ONCE = 4;  // parts whose numbers are on their way together

// The weights of a row's parts, against the largest lse of all. The sink is a part without numbers.
struct Weights {
  float reference, total;

  DUPLEX_DEVICE Weights(float largest, float sink) : reference(largest == -INFINITY ? 0.f : largest), total(of(sink)) {}
  DUPLEX_DEVICE float of(float lse) const { return ptx::exp2((lse - reference) * LOG2E); }
  DUPLEX_DEVICE float inverse() const { return total != 0 ? 1 / total : 0.f; }
  DUPLEX_DEVICE float lse() const { return total != 0 ? reference + ptx::log2(total) * LN2 : -INFINITY; }
};

// What a lane has of a row's weighted sum, run by run.
template <int COUNT>
struct RowSum {
  static constexpr int RUNS = MERGE_RUNS<COUNT>;
  float sum[RUNS][COUNT] = {};

  DUPLEX_DEVICE static int column(const Lanes& lanes, int run) { return (run * lanes.width() + lanes.lane()) * COUNT; }

  DUPLEX_DEVICE void add(int run, const float (&x)[COUNT], float weight) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) sum[run][n] = ptx::fma(x[n], weight, sum[run][n]);
  }

  // f(column, x) of each run of a row of `dim` numbers.
  template <class F>
  DUPLEX_DEVICE void finish(const Lanes& lanes, float inverse, int dim, F&& f) {
#pragma unroll
    for (int r = 0; r < RUNS; ++r) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) sum[r][n] *= inverse;
      if (column(lanes, r) < dim) f(column(lanes, r), sum[r]);
    }
  }
};

// How many lanes take a row: enough for all of its numbers, and for the weights of all parts that are read at once.
template <int COUNT>
int log2_merge_lanes(int dim) {
  constexpr int NUMBERS = MERGE_RUNS<COUNT> * COUNT;
  const int lanes = (dim + NUMBERS - 1) / NUMBERS;
  return log2_above(lanes < MERGE_AT_ONCE ? MERGE_AT_ONCE : lanes);
}

// Each group of a warp's lanes merges a row of `dim` numbers, all of as many parts, one at least: lse_of(part), numbers
// from row_of(part) on. store(column, x) writes. A part without weight adds nothing, whatever it holds, and the others
// are added in order, so it changes no bit. Returns the row's lse.
template <class T, int COUNT, class Lse, class Row, class Store>
DUPLEX_DEVICE float merge_rows(const Lanes& lanes, int parts, float sink, int dim, Lse&& lse_of, Row&& row_of,
                               Store&& store) {
  constexpr int RUNS = MERGE_RUNS<COUNT>, AT_ONCE = MERGE_AT_ONCE;
  const int width = lanes.width(), lane = lanes.lane();
  const auto column = [&](int run) { return RowSum<COUNT>::column(lanes, run); };

  Run<T, COUNT> x[AT_ONCE][RUNS];
  const auto bring = [&](int part) {
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
      const auto* row = row_of(part + t < parts ? part + t : parts - 1);
#pragma unroll
      for (int r = 0; r < RUNS; ++r) x[t][r] = load_run<T, COUNT>(row + (column(r) < dim ? column(r) : 0));
    }
  };
  // Each lane has a part's lse, of as many parts as there are lanes.
  const auto lse_from = [&](int part) { return part + lane < parts ? lse_of(part + lane) : -INFINITY; };

  float lse = lse_from(0), largest = fmaxf(sink, lse);
  RowSum<COUNT> sum;
  bring(0);
#pragma unroll 1
  for (int part = width; part < parts; part += width) largest = fmaxf(largest, lse_from(part));
  for (int mask = width / 2; mask > 0; mask /= 2) largest = fmaxf(largest, ptx::shuffle_xor(largest, mask));
  Weights weights(largest, sink);
#pragma unroll 1
  for (int part = 0; part < parts;) {
    const float own = weights.of(lse);
#pragma unroll
    for (int t = 0; t < AT_ONCE; ++t) {
      const float weight = lanes.of(own, (part & (width - 1)) + t);
      if (weight == 0) continue;  // NaN goes on
      weights.total += weight;
#pragma unroll
      for (int r = 0; r < RUNS; ++r) {
        float numbers[COUNT];
        widen_run<T>(x[t][r], numbers);
        sum.add(r, numbers, weight);
      }
    }
    part += AT_ONCE;
    if (part < parts) bring(part);
    if (part < parts && (part & (width - 1)) == 0) lse = lse_from(part);
  }
  sum.finish(lanes, weights.inverse(), dim, store);
  return weights.lse();
}

// The same of one part, number by number, to the same bits.
struct OnePart {
  float weight, inverse, lse;

  DUPLEX_DEVICE OnePart(float part_lse, float sink) {
    Weights weights(fmaxf(sink, part_lse), sink);
    weight = weights.of(part_lse);
    weights.total += weight;
    inverse = weights.inverse();
    lse = weights.lse();
  }
  DUPLEX_DEVICE float number(float x) const { return weight != 0 ? x * weight * inverse : 0.f; }
};

// The same by a warp: number_of(column) is what the part has, store(column, x) writes.
template <class Number, class Store>
DUPLEX_DEVICE float merge_one(float part_lse, float sink, int dim, int lane, Number&& number_of, Store&& store) {
  constexpr int NUMBERS = 256 / 32;
  const OnePart whole(part_lse, sink);
  float x[NUMBERS] = {};
  if (whole.weight != 0) {
#pragma unroll
    for (int n = 0; n < NUMBERS; ++n)
      if (lane + 32 * n < dim) x[n] = number_of(lane + 32 * n) * whole.weight;
  }
#pragma unroll
  for (int n = 0; n < NUMBERS; ++n)
    if (lane + 32 * n < dim) store(lane + 32 * n, x[n] * whole.inverse);
  return whole.lse;
}

}  // namespace duplex
