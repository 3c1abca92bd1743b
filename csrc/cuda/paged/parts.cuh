// Rows whose results lie in parts: a few lanes of a warp take a head of one.
#pragma once

#include "cuda/merge_row.cuh"
#include "cuda/paged/call.h"

namespace duplex::paged {

constexpr int PARTS_THREADS = 128;

// Powers of two, by their logarithms: how many rows of a union have blocks of their own, how many blocks the heads of
// a row take, how many lanes a head.
struct PartsShape {
  int32_t log2_rows, log2_blocks, log2_lanes;
};

template <class T, int COUNT>
DUPLEX_KERNEL_SHARING(PARTS_THREADS, 4)
parts_kernel(DUPLEX_PARAMETER Call c, PartsShape shape) {
  const Lanes lanes(shape.log2_lanes);
  const int block = ptx::block_index(), rows = 1 << shape.log2_rows;
  const int head_block = block & ((1 << shape.log2_blocks) - 1), row_block = block >> shape.log2_blocks & (rows - 1);
  const int own = head_block * (PARTS_THREADS >> shape.log2_lanes) + lanes.row();
  const bool live = own < c.heads_q;
  const int head = live ? own : 0, n = block >> (shape.log2_blocks + shape.log2_rows);
  Union u;
  if (!(c.plan ? union_of(c.batch, c.plan, c.capacity, n, u) : union_of(c.batch, c.division, n, u))) return;
  const float sink = c.sink ? c.sink[head] : -INFINITY;
  const auto* numbers = reinterpret_cast<const uint32_t*>(c.parts) + int64_t(head) * c.head_dim_v;
  const float* lses = c.parts_lse + int64_t(head) * c.slots;
  for (int32_t row = u.row + row_block; row < u.row_end; row += rows) {
    const auto slot = [&](int t) { return int32_t(u.slot(t, row)); };
    auto* to = c.out.template at<typename T::Stored>(0, row, head);
    const float lse = merge_rows<Float32, COUNT>(
        lanes, u.shared + u.own, sink, c.head_dim_v, [&](int t) { return lses[slot(t)]; },
        [&](int t) { return numbers + slot(t) * (int64_t(c.heads_q) * c.head_dim_v); },
        [&](int column, const float (&x)[COUNT]) {
          if (live) store_vector<T>(to + column, x);
        });
    if (live && lanes.lane() == 0) c.lse[int64_t(head) * c.batch.rows_q + row] = lse;
  }
}

}  // namespace duplex::paged
