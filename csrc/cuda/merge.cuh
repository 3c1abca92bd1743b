// A few lanes of a warp merge a row.
#pragma once

#include "cuda/merge.h"
#include "cuda/merge_row.cuh"

namespace duplex {

constexpr int MERGE_THREADS = 128;

template <class T, int COUNT>
DUPLEX_KERNEL_SHARING(MERGE_THREADS, COUNT > 1 ? 6 : 4)
merge_kernel(DUPLEX_PARAMETER Merge m, int log2_lanes) {
  using Stored = typename T::Stored;
  const Lanes lanes(log2_lanes);
  const uint32_t rows = uint32_t(m.rows), heads = uint32_t(m.heads), all = uint32_t(m.batch) * rows * heads;
  const uint32_t own = uint32_t(ptx::block_index()) * (MERGE_THREADS >> log2_lanes) + lanes.row();
  const bool live = own < all;
  const uint32_t n = live ? own : 0, head = n % heads, row = n / heads % rows, b = n / heads / rows;
  Stored* to = static_cast<Stored*>(m.out) + int64_t(n) * m.dim;
  const float lse = merge_rows<T, COUNT>(
      lanes, m.count, -INFINITY, m.dim,
      [&](int t) {
        const MergePart& p = m.parts[t];
        return p.lse[b * p.lse_batch + head * p.lse_head + row * p.lse_row];
      },
      [&](int t) { return m.parts[t].out.template at<Stored>(b, row, head); },
      [&](int column, const float (&x)[COUNT]) {
        if (live) *reinterpret_cast<Run<T, COUNT>*>(to + column) = narrow_run<T>(x);
      });
  if (live && lanes.lane() == 0) m.lse[(int64_t(b) * heads + head) * rows + row] = lse;
}

}  // namespace duplex
