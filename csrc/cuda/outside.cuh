// Rows that belong to no sequence: 0 and -inf. A warp takes a row.
#pragma once

#include <math.h>

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

constexpr int OUTSIDE_THREADS = 128;

DUPLEX_KERNEL(OUTSIDE_THREADS)
outside_kernel(DUPLEX_PARAMETER ForwardArguments a) {
  const int lane = ptx::thread_index() % 32;
  const Lengths& l = a.lengths;
  const int64_t sequences = l.cu_q ? 1 : l.batch, step = int64_t(ptx::blocks()) * (OUTSIDE_THREADS / 32);
  int64_t n = int64_t(ptx::block_index()) * (OUTSIDE_THREADS / 32) + ptx::thread_index() / 32;
  for (; n < sequences * l.rows_q; n += step) {
    const int32_t b = int32_t(n / l.rows_q), row = int32_t(n % l.rows_q);
    if (l.cu_q) {
      if (row < l.cu_q[l.batch]) continue;
    } else {
      const RowRange q = query_rows(l, b);
      if (q.row <= row && row < q.row + q.length) continue;
    }
    for (int h = 0; h < a.heads_q; ++h) {
      uint16_t* out = static_cast<uint16_t*>(a.out) + b * a.out_batch + row * a.out_row + h * a.out_head;
      for (int d = lane; d < a.head_dim_v; d += 32) out[d] = 0;
      if (lane == 0) a.lse[b * a.lse_batch + h * a.lse_head + row] = -INFINITY;
    }
  }
}

}  // namespace duplex
