// The gradient of distance_bias from what the teams have summed: a warp adds a part of the slots for 32 entries, a
// block all of them, in a fixed order.
#pragma once

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

constexpr int DISTANCE_PARTS = 8, DISTANCE_THREADS = 32 * DISTANCE_PARTS, DISTANCE_SHARED = 4 * DISTANCE_THREADS;

// Blocks for each head's entries.
DUPLEX_HOST_DEVICE inline int64_t distance_blocks(int64_t radius) { return (2 * radius + 1 + 31) / 32; }

DUPLEX_KERNEL(DISTANCE_THREADS)
distance_kernel(DUPLEX_PARAMETER DistanceSums s, float* to, int32_t radius) {
  const int64_t blocks = distance_blocks(radius), entries = 2 * int64_t(radius) + 1;
  const int head = int(ptx::block_index() / blocks), lane = ptx::thread_index() % 32, part = ptx::thread_index() / 32;
  const int64_t entry = ptx::block_index() % blocks * 32 + lane, distance = entry - radius;
  float sum = 0;
  if (-s.radius <= distance && distance <= s.radius)
#pragma unroll 8
    for (int slot = part; slot < s.count; slot += DISTANCE_PARTS)
      sum += s.slots[s.place(slot, head) + s.radius + distance];
  const uint32_t shared = ptx::shared_base();
  ptx::shared_store(shared + 4 * ptx::thread_index(), sum);
  ptx::block_sync();
  if (part > 0 || entry >= entries) return;
  for (int p = 1; p < DISTANCE_PARTS; ++p) sum += ptx::shared_load_float(shared + 4 * (32 * p + lane));
  to[(s.first_head + head) * entries + entry] = sum;
}

}  // namespace duplex
