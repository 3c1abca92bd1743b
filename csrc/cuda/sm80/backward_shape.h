// The tiles of the backward kernels for each head_dim, and where they lie in shared memory.
#pragma once

#include <stdint.h>

#include "cuda/row_sums.h"
#include "cuda/swizzle.h"

namespace duplex::sm80 {

// dk and dv. By head_dim: warps, tiles of 16 keys that each has, rows a step, and whether the two accumulators of 16
// keys are more than a warp holds, so that half of the warps have dv and half dk of the same keys and each computes the
// scores for itself. Two steps are in flight.
template <int WARPS_, int KEY_TILES_, int BLOCK_M_, bool DIVIDED_>
struct KeyChosen {
  static constexpr int WARPS = WARPS_, KEY_TILES = KEY_TILES_, BLOCK_M = BLOCK_M_;
  static constexpr bool DIVIDED = DIVIDED_;
};

template <int HEAD_DIM>
struct KeyChoice;
template <>
struct KeyChoice<64> : KeyChosen<4, 2, 32, false> {};
template <>
struct KeyChoice<96> : KeyChosen<8, 1, 64, false> {};
template <>
struct KeyChoice<128> : KeyChosen<8, 1, 32, false> {};
template <>
struct KeyChoice<192> : KeyChosen<8, 1, 32, true> {};
template <>
struct KeyChoice<256> : KeyChosen<8, 1, 16, true> {};

template <int HEAD_DIM_>
struct KeyShape : KeyChoice<HEAD_DIM_> {
  using KeyChoice<HEAD_DIM_>::WARPS, KeyChoice<HEAD_DIM_>::KEY_TILES, KeyChoice<HEAD_DIM_>::BLOCK_M,
      KeyChoice<HEAD_DIM_>::DIVIDED;
  static constexpr int HEAD_DIM = HEAD_DIM_, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int WARP_KEYS = 16 * KEY_TILES, BLOCK_N = WARP_KEYS * WARPS / (DIVIDED ? 2 : 1);
  static_assert(SUM_ROWS % BLOCK_M == 0);

  using Keys = Tile<BLOCK_N, HEAD_DIM>;
  using Rows = Tile<BLOCK_M, HEAD_DIM>;

  static constexpr int K = 0, V = K + Keys::BYTES, Q = V + Keys::BYTES;
  static constexpr int DOUT = Q + STAGES * Rows::BYTES;
  static constexpr int SUMS = DOUT + STAGES * Rows::BYTES;  // references, then deltas
  static constexpr int SUM_BYTES = BLOCK_M * 4;
  static constexpr int SHARED_BYTES = SUMS + STAGES * 2 * SUM_BYTES;
  static_assert(SHARED_BYTES <= 99 * 1024, "what the smaller of the later cards have");
};

// dq. By head_dim: warps and tiles of 16 rows that each has, keys a step. Two steps are in flight.
template <int WARPS_, int ROW_TILES_, int BLOCK_N_>
struct QueryChosen {
  static constexpr int WARPS = WARPS_, ROW_TILES = ROW_TILES_, BLOCK_N = BLOCK_N_;
};

template <int HEAD_DIM>
struct QueryChoice;
template <>
struct QueryChoice<64> : QueryChosen<4, 2, 32> {};
template <>
struct QueryChoice<96> : QueryChosen<4, 2, 32> {};
template <>
struct QueryChoice<128> : QueryChosen<4, 2, 32> {};
template <>
struct QueryChoice<192> : QueryChosen<4, 1, 32> {};
template <>
struct QueryChoice<256> : QueryChosen<4, 1, 16> {};

template <int HEAD_DIM_>
struct QueryShape : QueryChoice<HEAD_DIM_> {
  using QueryChoice<HEAD_DIM_>::WARPS, QueryChoice<HEAD_DIM_>::ROW_TILES, QueryChoice<HEAD_DIM_>::BLOCK_N;
  static constexpr int HEAD_DIM = HEAD_DIM_, THREADS = 32 * WARPS, STAGES = 2;
  static constexpr int WARP_ROWS = 16 * ROW_TILES, BLOCK_M = WARP_ROWS * WARPS;
  static_assert(SUM_ROWS % BLOCK_M == 0);

  using Rows = Tile<BLOCK_M, HEAD_DIM>;
  using Keys = Tile<BLOCK_N, HEAD_DIM>;

  static constexpr int Q = 0, DOUT = Q + Rows::BYTES, K = DOUT + Rows::BYTES;
  static constexpr int V = K + STAGES * Keys::BYTES;
  static constexpr int SHARED_BYTES = V + STAGES * Keys::BYTES;
  static_assert(SHARED_BYTES <= 99 * 1024, "what the smaller of the later cards have");
};

}  // namespace duplex::sm80
