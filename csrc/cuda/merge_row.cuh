// The exact union of attentions of one row over disjoint keys: each part weighted by exp(lse_part - lse).
#pragma once

#include <math.h>

#include "cuda/ptx.cuh"

namespace duplex {

constexpr int MERGE_NUMBERS = 8;  // a lane's at most: a row has up to 256

// A warp merges a row of `dim` numbers. lse_of(part) and number_of(part, column) read parts, store(column, x) writes;
// the sink is a part without numbers. A part without weight adds nothing, whatever it holds. Returns the row's lse.
template <class Lse, class Number, class Store>
DUPLEX_DEVICE float merge_row(int parts, float sink, int dim, int lane, Lse&& lse_of, Number&& number_of,
                              Store&& store) {
  float largest = sink;
  for (int t = 0; t < parts; ++t) largest = fmaxf(largest, lse_of(t));
  const float reference = largest == -INFINITY ? 0.f : largest;
  float total = ptx::exp2((sink - reference) * LOG2E), sum[MERGE_NUMBERS];
#pragma unroll
  for (int n = 0; n < MERGE_NUMBERS; ++n) sum[n] = 0;
  for (int t = 0; t < parts; ++t) {
    const float weight = ptx::exp2((lse_of(t) - reference) * LOG2E);
    if (weight == 0) continue;  // NaN goes on
    total += weight;
#pragma unroll
    for (int n = 0; n < MERGE_NUMBERS; ++n)
      if (lane + 32 * n < dim) sum[n] = ptx::fma(number_of(t, lane + 32 * n), weight, sum[n]);
  }
  const bool seen = total != 0;
#pragma unroll
  for (int n = 0; n < MERGE_NUMBERS; ++n)
    if (lane + 32 * n < dim) store(lane + 32 * n, seen ? sum[n] / total : 0.f);
  return seen ? reference + ptx::log2(total) * LN2 : -INFINITY;
}

// The same of one part, number by number, to the same bits.
struct OnePart {
  float weight, total, lse;

  DUPLEX_DEVICE OnePart(float part_lse, float sink) {
    const float largest = fmaxf(sink, part_lse), reference = largest == -INFINITY ? 0.f : largest;
    weight = ptx::exp2((part_lse - reference) * LOG2E);
    total = ptx::exp2((sink - reference) * LOG2E) + weight;
    lse = total != 0 ? reference + ptx::log2(total) * LN2 : -INFINITY;
  }
  DUPLEX_DEVICE float number(float x) const { return weight != 0 ? x * weight / total : 0.f; }
};

}  // namespace duplex
