// The tiles of the forward kernel for each head_dim, and where they lie in shared memory.
#pragma once

#include <stdint.h>

#include "cuda/swizzle.h"

namespace duplex::sm80 {

// By head_dim; those between take the next one, whose rest the copies fill with 0. Warps of a block and tiles of 16
// rows that each has, keys a block, and buffers that blocks of keys and of values take in turn. Two tiles of rows share
// what a warp reads of keys and values, which else takes as long as the products; in the widest, one fills the
// registers.
template <int WARPS_, int ROW_TILES_, int BLOCK_N_, int BUFFERS_>
struct Chosen {
  static constexpr int WARPS = WARPS_, ROW_TILES = ROW_TILES_, BLOCK_N = BLOCK_N_, BUFFERS = BUFFERS_;
};

template <int HEAD_DIM>
struct Choice;
template <>
struct Choice<64> : Chosen<4, 2, 64, 4> {};
template <>
struct Choice<96> : Chosen<4, 2, 64, 2> {};
template <>
struct Choice<128> : Chosen<4, 2, 64, 3> {};
template <>
struct Choice<192> : Chosen<8, 1, 64, 2> {};
template <>
struct Choice<256> : Chosen<8, 1, 32, 2> {};

template <int HEAD_DIM_>
struct Shape : Choice<HEAD_DIM_> {
  using Choice<HEAD_DIM_>::WARPS, Choice<HEAD_DIM_>::ROW_TILES, Choice<HEAD_DIM_>::BLOCK_N, Choice<HEAD_DIM_>::BUFFERS;
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int WARP_ROWS = 16 * ROW_TILES;
  static constexpr int BLOCK_M = WARP_ROWS * WARPS;
  static constexpr int THREADS = 32 * WARPS;

  using Queries = Tile<BLOCK_M, HEAD_DIM>;
  using Keys = Tile<BLOCK_N, HEAD_DIM>;  // and values

  static constexpr int Q = 0;
  static constexpr int KEYS = Q + Queries::BYTES;
  static constexpr int SHARED_BYTES = KEYS + BUFFERS * Keys::BYTES;
  static_assert(SHARED_BYTES <= 99 * 1024, "what the smaller of the later cards have");
};

}  // namespace duplex::sm80
