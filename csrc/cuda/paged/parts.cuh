// Rows whose results lie in parts: a block takes a head of them, a warp a row.
#pragma once

#include "cuda/merge_row.cuh"
#include "cuda/paged/call.h"
#include "cuda/vector.cuh"

namespace duplex::paged {

constexpr int PARTS_THREADS = 128;

template <class T>
DUPLEX_KERNEL(PARTS_THREADS)
parts_kernel(DUPLEX_PARAMETER Call c) {
  const int n = ptx::block_index() / c.heads_q, head = ptx::block_index() % c.heads_q;
  const int warp = ptx::thread_index() / 32, lane = ptx::thread_index() % 32;
  Union u;
  if (!(c.plan ? union_of(c.batch, c.plan, c.capacity, n, u) : union_of(c.batch, c.division, n, u))) return;
  for (int32_t row = u.row + warp; row < u.row_end; row += PARTS_THREADS / 32) {
    auto* to = c.out.template at<typename T::Stored>(0, row, head);
    const float lse = merge_row(
        u.shared + u.own, c.sink ? c.sink[head] : -INFINITY, c.head_dim_v, lane,
        [&](int t) { return c.parts_lse[int64_t(head) * c.slots + u.slot(t, row)]; },
        [&](int t, int column) { return c.parts[(u.slot(t, row) * c.heads_q + head) * c.head_dim_v + column]; },
        [&](int column, float x) { to[column] = narrow<T>(x); });
    if (lane == 0) c.lse[int64_t(head) * c.batch.rows_q + row] = lse;
  }
}

}  // namespace duplex::paged
