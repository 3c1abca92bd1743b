// The tiles of the forward kernel for each head_dim, and where they lie in shared memory.
#pragma once

#include <stdint.h>

#include "cuda/swizzle.h"

namespace duplex::sm90 {

// By head_dim; those between take the next one, whose rest the copies fill with 0. Keys a block, blocks of keys (and of
// values) in flight, computing warpgroups of 64 rows each, and the registers that a loading thread keeps; in the
// widest, the loader spills between tiles so that the others need not within them.
template <int BLOCK_N_, int STAGES_, int WARPGROUPS_, int LOADER_REGISTERS_>
struct Chosen {
  static constexpr int BLOCK_N = BLOCK_N_, STAGES = STAGES_, WARPGROUPS = WARPGROUPS_;
  static constexpr int LOADER_REGISTERS = LOADER_REGISTERS_;
};

// What only one of the computing warpgroups does at a time, so that the others do the rest meanwhile: begin products,
// or exponentials where these take as long.
enum class Turns { AT_PRODUCTS, AT_EXPONENTIALS };

template <int HEAD_DIM>
struct Choice;
template <>
struct Choice<64> : Chosen<128, 4, 2, 40> {};
template <>
struct Choice<96> : Chosen<128, 3, 2, 40> {};
template <>
struct Choice<128> : Chosen<128, 2, 2, 40> {};
template <>
struct Choice<192> : Chosen<96, 2, 2, 40> {};
template <>
struct Choice<256> : Chosen<64, 2, 2, 24> {};

template <int HEAD_DIM_>
struct Shape : Choice<HEAD_DIM_> {
  using Choice<HEAD_DIM_>::BLOCK_N, Choice<HEAD_DIM_>::STAGES, Choice<HEAD_DIM_>::WARPGROUPS,
      Choice<HEAD_DIM_>::LOADER_REGISTERS;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int BLOCK_M = 64 * WARPGROUPS;
  static constexpr int THREADS = 128 * (WARPGROUPS + 1);  // a warpgroup that loads, and those that compute
  // A thread's at the start, and of those what the loading warpgroup leaves to each that computes; in eights.
  static constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8;
  static constexpr int LEFT = (ENTRY_REGISTERS * (WARPGROUPS + 1) - LOADER_REGISTERS) / WARPGROUPS / 8 * 8;
  static constexpr int COMPUTE_REGISTERS = LEFT < 240 ? LEFT : 240;

  static constexpr Turns TURNS = HEAD_DIM <= 64 ? Turns::AT_EXPONENTIALS : Turns::AT_PRODUCTS;
  static constexpr int Q_STAGES = HEAD_DIM <= 128 ? 2 : 1;  // tiles of queries in flight, where there is room

  using Queries = Tile<BLOCK_M, HEAD_DIM>;
  using Keys = Tile<BLOCK_N, HEAD_DIM>;

  static constexpr int Q = 0;
  static constexpr int K = Q + Q_STAGES * Queries::BYTES;
  static constexpr int V = K + STAGES * Keys::BYTES;
  static constexpr int BARRIERS = V + STAGES * Keys::BYTES;
  static constexpr int FACTOR = BARRIERS + 8 * (2 * Q_STAGES + 4 * STAGES);
  static constexpr int SHARED_BYTES = FACTOR + 16;
  static_assert(SHARED_BYTES <= 227 * 1024);
};

// Addresses in shared memory of a block that starts at `base`.
template <class S>
struct Shared {
  uint32_t base;

  DUPLEX_HOST_DEVICE uint32_t q(int stage = 0) const { return base + S::Q + stage * S::Queries::BYTES; }
  DUPLEX_HOST_DEVICE uint32_t k(int stage) const { return base + S::K + stage * S::Keys::BYTES; }
  DUPLEX_HOST_DEVICE uint32_t v(int stage) const { return base + S::V + stage * S::Keys::BYTES; }
  DUPLEX_HOST_DEVICE uint32_t barrier(int n) const { return base + S::BARRIERS + 8 * n; }
  // Full: its bytes have come. Empty: every warp that computes has read it.
  DUPLEX_HOST_DEVICE uint32_t k_full(int stage) const { return barrier(stage); }
  DUPLEX_HOST_DEVICE uint32_t k_empty(int stage) const { return barrier(S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t v_full(int stage) const { return barrier(2 * S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t v_empty(int stage) const { return barrier(3 * S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t q_full(int stage) const { return barrier(4 * S::STAGES + stage); }
  DUPLEX_HOST_DEVICE uint32_t q_empty(int stage) const { return barrier(4 * S::STAGES + S::Q_STAGES + stage); }
  // Of scores in exponents.
  DUPLEX_HOST_DEVICE uint32_t factor() const { return base + S::FACTOR; }
};

}  // namespace duplex::sm90
