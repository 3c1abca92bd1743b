// A warp merges a row.
#pragma once

#include "cuda/merge.h"
#include "cuda/merge_row.cuh"
#include "cuda/vector.cuh"

namespace duplex {

constexpr int MERGE_THREADS = 128;

template <class T>
DUPLEX_KERNEL(MERGE_THREADS)
merge_kernel(DUPLEX_PARAMETER Merge m) {
  using Stored = typename T::Stored;
  const int lane = ptx::thread_index() % 32;
  const int64_t n = int64_t(ptx::block_index()) * (MERGE_THREADS / 32) + ptx::thread_index() / 32;
  if (n >= m.batch * m.rows * m.heads) return;
  const int64_t head = n % m.heads, row = n / m.heads % m.rows, b = n / m.heads / m.rows;
  Stored* to = static_cast<Stored*>(m.out) + n * m.dim;
  const float lse = merge_row(
      m.count, -INFINITY, m.dim, lane,
      [&](int t) {
        const MergePart& p = m.parts[t];
        return p.lse[b * p.lse_batch + head * p.lse_head + row * p.lse_row];
      },
      [&](int t, int column) { return widen<T>(m.parts[t].out.template at<Stored>(b, row, head)[column]); },
      [&](int column, float x) { to[column] = narrow<T>(x); });
  if (lane == 0) m.lse[(b * m.heads + head) * m.rows + row] = lse;
}

}  // namespace duplex
