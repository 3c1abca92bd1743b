// The tiles of the forward kernel for each head_dim, and where they lie in shared memory.
#pragma once

#include <stdint.h>

#include "cuda/swizzle.h"

namespace duplex::sm90 {

// Smaller head_dims take the next one here; the copies fill the rest with 0.
constexpr int HEAD_DIMS[] = {64, 96, 128, 192, 256};

template <int HEAD_DIM>
struct Choice;  // keys a block, blocks of keys (and of values) in flight
template <>
struct Choice<64> {
  static constexpr int BLOCK_N = 128, STAGES = 4, WARPGROUPS = 2;
};
template <>
struct Choice<96> {
  static constexpr int BLOCK_N = 128, STAGES = 3, WARPGROUPS = 2;
};
template <>
struct Choice<128> {
  static constexpr int BLOCK_N = 128, STAGES = 2, WARPGROUPS = 2;
};
template <>
struct Choice<192> {
  static constexpr int BLOCK_N = 96, STAGES = 2, WARPGROUPS = 2;
};
template <>
struct Choice<256> {
  static constexpr int BLOCK_N = 64, STAGES = 2, WARPGROUPS = 2;
};

template <int HEAD_DIM_>
struct Shape : Choice<HEAD_DIM_> {
  using Choice<HEAD_DIM_>::BLOCK_N, Choice<HEAD_DIM_>::STAGES, Choice<HEAD_DIM_>::WARPGROUPS;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_M = 64 * WARPGROUPS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);  // a warpgroup that loads, and those that compute
  // Registers a thread: 64 Ki for all, in eights, divided anew once the roles are known.
  static constexpr int LOADER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static constexpr int COMPUTE_REGISTERS = WARPGROUPS == 2 ? 232 : 160;

  using Queries = Tile<BLOCK_M, HEAD_DIM>;
  using Keys = Tile<BLOCK_N, HEAD_DIM>;

  static constexpr int Q = 0;
  static constexpr int K = Q + Queries::BYTES;
  static constexpr int V = K + STAGES * Keys::BYTES;
  static constexpr int BARRIERS = V + STAGES * Keys::BYTES;
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 4 * STAGES);
  static_assert(SHARED_BYTES <= 227 * 1024);
};

// Addresses in shared memory of a block that starts at `base`.
template <class S>
struct Shared {
  uint32_t base;

  DUPLEX_HOST_DEVICE uint32_t q() const { return base + S::Q; }
  DUPLEX_HOST_DEVICE uint32_t k(int stage) const { return base + S::K + stage * S::Keys::BYTES; }
  DUPLEX_HOST_DEVICE uint32_t v(int stage) const { return base + S::V + stage * S::Keys::BYTES; }
  DUPLEX_HOST_DEVICE uint32_t barrier(int n) const { return base + S::BARRIERS + 8 * n; }
  // Full: its bytes have come. Empty: every warp that computes has read it.
  DUPLEX_HOST_DEVICE uint32_t q_full() const { return barrier(0); }
  DUPLEX_HOST_DEVICE uint32_t q_empty() const { return barrier(1); }
  DUPLEX_HOST_DEVICE uint32_t k_full(int stage) const { return barrier(2 + stage); }
  DUPLEX_HOST_DEVICE uint32_t k_empty(int stage) const { return barrier(2 + S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t v_full(int stage) const { return barrier(2 + 2 * S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t v_empty(int stage) const { return barrier(2 + 3 * S::STAGES + stage); }
};

}  // namespace duplex::sm90
