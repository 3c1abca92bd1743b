// Terms and mask on a lane's products, where its two rows may be of any queries and heads.
#pragma once

#include "cuda/softmax.cuh"

namespace duplex::paged {

// Of the rows of accumulators numbered row_of(n).
struct RowPair {
  int32_t i[2], head[2];
};

// The terms of section 3 on a block of products; j is the key of the lane's first column.
template <int COUNT>
DUPLEX_DEVICE void add_terms(float (&x)[COUNT], const Terms& t, const RowPair& rows, int32_t j, int32_t offset) {
  scale_and_cap(x, t, [](int, float) {});
  const int32_t distance[2] = {j - (rows.i[0] + offset), j - (rows.i[1] + offset)};
  if (t.distance_bias) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int r = row_of(n);
      const float* middle = t.distance_bias + int64_t(rows.head[r]) * (2 * t.radius + 1) + t.radius;
      x[n] += middle[clamp32(distance[r] + column_of(n), -t.radius, t.radius)];
    }
  }
  if (t.alibi_slopes) {
    const float slope[2] = {t.alibi_slopes[rows.head[0]], t.alibi_slopes[rows.head[1]]};
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] -= slope[row_of(n)] * fabsf(float(distance[row_of(n)] + column_of(n)));
  }
}

// -inf where the span hides a key.
template <int COUNT>
DUPLEX_DEVICE void hide(float (&x)[COUNT], const Span& s, const RowPair& rows, int32_t j) {
  const int32_t live = int32_t(s.len_k) - j, prefix = int32_t(s.prefix) - j;
  int32_t low[2], high[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t place = rows.i[r] + int32_t(s.offset) - j;
    low[r] = place - int32_t(s.left);
    high[r] = place + int32_t(s.right);
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const int c = column_of(n), r = row_of(n);
    const bool seen = (c < live) & ((c < prefix) | ((low[r] <= c) & (c <= high[r])));  // without branches
    x[n] = seen ? x[n] : -INFINITY;
  }
}

}  // namespace duplex::paged
