// The gradient of sinks: dsink[h] = -sum over rows of exp(sink[h] - lse) * delta, as a sink is one more key whose value
// is 0. A block takes a head, a warp SUM_ROWS rows at a time; the order of sums is fixed.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

constexpr int SINK_THREADS = 512, SINK_SHARED = 4 * SINK_THREADS / 32;

DUPLEX_KERNEL(SINK_THREADS)
sink_kernel(DUPLEX_PARAMETER SinkArguments a) {
  const Lengths& l = a.lengths;
  const int head = ptx::block_index(), warp = ptx::thread_index() / 32, lane = ptx::thread_index() % 32;
  const int blocks = (l.max_q + SUM_ROWS - 1) / SUM_ROWS;
  const float sink = a.sink[head] * LOG2E;
  float sum = 0;
  for (int64_t n = warp; n < int64_t(l.batch) * blocks; n += SINK_THREADS / 32) {
    const int b = int(n / blocks), i0 = int(n % blocks) * SUM_ROWS;
    const RowRange q = query_rows(l, b);
    if (i0 >= q.length) continue;
    const int64_t at = head * a.sums.head + RowSums::start(l, b, q.row) + i0 + lane;
#pragma unroll
    for (int i = 0; i < SUM_ROWS; i += 32) sum -= ptx::exp2(sink - a.sums.references[at + i]) * a.sums.deltas[at + i];
  }
  for (int mask = 1; mask < 32; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
  const uint32_t shared = ptx::shared_base();
  if (lane == 0) ptx::shared_store(shared + 4 * warp, sum);
  ptx::block_sync();
  if (ptx::thread_index() > 0) return;
  float total = 0;
  for (int n = 0; n < SINK_THREADS / 32; n += 2) {
    float pair[2];
    ptx::shared_load2(shared + 4 * n, pair);
    total += pair[0] + pair[1];
  }
  a.dsink[head] = total;
}

}  // namespace duplex
