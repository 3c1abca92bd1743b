// Rows that belong to no sequence: 0, and -inf for their log-sum-exp. A warp takes a row.
#pragma once

#include <math.h>

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

constexpr int OUTSIDE_THREADS = 128;

DUPLEX_KERNEL(OUTSIDE_THREADS)
outside_kernel(DUPLEX_PARAMETER OutsideArguments a) {
  const int lane = ptx::thread_index() % 32;
  const Lengths& l = a.lengths;
  const int32_t* cu = a.keys ? l.cu_k : l.cu_q;
  const int32_t rows = a.keys ? l.rows_k : l.rows_q;
  const int64_t sequences = cu ? 1 : l.batch, step = int64_t(ptx::blocks()) * (OUTSIDE_THREADS / 32);
  int64_t n = int64_t(ptx::block_index()) * (OUTSIDE_THREADS / 32) + ptx::thread_index() / 32;
  for (; n < sequences * rows; n += step) {
    const int32_t b = int32_t(n / rows), row = int32_t(n % rows);
    if (cu) {
      if (row < cu[l.batch]) continue;
    } else {
      const RowRange x = a.keys ? key_rows(l, b) : query_rows(l, b);
      if (x.row <= row && row < x.row + x.length) continue;
    }
    for (int h = 0; h < a.heads; ++h) {
      uint16_t* to = a.rows.at(b, row, h);
      for (int d = lane; d < a.columns; d += 32) to[d] = 0;
      if (a.lse && lane == 0) a.lse[b * a.lse_batch + h * a.lse_head + row] = -INFINITY;
    }
  }
}

}  // namespace duplex
