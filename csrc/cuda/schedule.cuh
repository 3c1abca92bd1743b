// Ranks the entries of a call: a thread counts how many come before its own.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/schedule.h"

namespace duplex {

constexpr int SCHEDULE_THREADS = 256;
constexpr int SCHEDULE_SHARED = SCHEDULE_THREADS * 4;

DUPLEX_KERNEL(SCHEDULE_THREADS)
schedule_kernel(DUPLEX_PARAMETER Lengths lengths, DUPLEX_PARAMETER Entries entries, Order order) {
  ptx::let_next_launch_begin();
  const int thread = ptx::thread_index();
  const int32_t count = int32_t(entries.count(lengths));
  const int32_t own = ptx::block_index() * SCHEDULE_THREADS + thread;
  const int32_t own_cost = own < count ? cost(entries, lengths, own) : 0;
  const uint32_t shared = ptx::shared_base();
  int32_t rank = 0, real = 0;
  for (int32_t start = 0; start < count; start += SCHEDULE_THREADS) {
    const int32_t other = start + thread;
    ptx::shared_store(shared + 4 * thread, other < count ? cost(entries, lengths, other) : 0);
    ptx::block_sync();
#pragma unroll 8
    for (int32_t n = 0; n < SCHEDULE_THREADS; n += 4) {
      const Words4 four = ptx::shared_load16(shared + 4 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t c = int32_t(four.word[i]);
        rank += comes_before(c, start + n + i, own_cost, own);
        real += c > 0;
      }
    }
    ptx::block_sync();
  }
  if (own == 0) {
    order.data[0] = real;
    *order.taken() = 0;
  }
  if (own_cost > 0) order.rank(rank) = own;
}

}  // namespace duplex
