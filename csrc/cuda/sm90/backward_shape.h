// The tiles of the backward kernels for each head_dim, and where they lie in shared memory.
#pragma once

#include <stdint.h>

#include "cuda/row_sums.h"
#include "cuda/swizzle.h"

namespace duplex::sm90 {

// A warpgroup that loads and two that compute: a thread of each has 168 registers at the start, and the loading one
// leaves to the others what it does not keep.
struct Warpgroups {
  static constexpr int WARPGROUPS = 2, WARPS = 8, THREADS = 384;

  static constexpr int left_by(int loader_registers) { return (3 * 168 - loader_registers) / 2; }
};

// dk and dv. By head_dim: rows a step, steps in flight, whether the two accumulators of 64 keys are more than a
// warpgroup holds, so that one has dv and the other dk of the same keys and each computes the scores for itself, and
// the registers that a loading thread keeps.
template <int BLOCK_M_, int STAGES_, bool DIVIDED_, int LOADER_REGISTERS_>
struct KeyChosen {
  static constexpr int BLOCK_M = BLOCK_M_, STAGES = STAGES_, LOADER_REGISTERS = LOADER_REGISTERS_;
  static constexpr bool DIVIDED = DIVIDED_;
};

template <int HEAD_DIM>
struct KeyChoice;
template <>
struct KeyChoice<64> : KeyChosen<64, 4, false, 40> {};
template <>
struct KeyChoice<96> : KeyChosen<64, 4, false, 40> {};
template <>
struct KeyChoice<128> : KeyChosen<64, 3, false, 24> {};
template <>
struct KeyChoice<192> : KeyChosen<64, 3, true, 40> {};
template <>
struct KeyChoice<256> : KeyChosen<64, 2, true, 24> {};

template <int HEAD_DIM_>
struct KeyShape : KeyChoice<HEAD_DIM_>, Warpgroups {
  using KeyChoice<HEAD_DIM_>::BLOCK_M, KeyChoice<HEAD_DIM_>::STAGES, KeyChoice<HEAD_DIM_>::DIVIDED,
      KeyChoice<HEAD_DIM_>::LOADER_REGISTERS;
  static constexpr int HEAD_DIM = HEAD_DIM_, BLOCK_N = DIVIDED ? 64 : 128,
                       COMPUTE_REGISTERS = left_by(LOADER_REGISTERS);
  static_assert(SUM_ROWS % BLOCK_M == 0);

  using Keys = Tile<BLOCK_N, HEAD_DIM>;
  using Rows = Tile<BLOCK_M, HEAD_DIM>;

  static constexpr int K = 0, V = K + Keys::BYTES, Q = V + Keys::BYTES;
  static constexpr int DOUT = Q + STAGES * Rows::BYTES;
  static constexpr int SUMS = DOUT + STAGES * Rows::BYTES;  // references, then deltas
  static constexpr int SUM_BYTES = BLOCK_M * 4;
  static constexpr int BARRIERS = SUMS + STAGES * 2 * SUM_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 2 * STAGES);
  static_assert(SHARED_BYTES <= 227 * 1024);

  // Addresses in shared memory of a block that starts at `base`. Full: its bytes have come. Empty: every warp that
  // computes has read it.
  struct Shared {
    uint32_t base;

    DUPLEX_HOST_DEVICE uint32_t k() const { return base + K; }
    DUPLEX_HOST_DEVICE uint32_t v() const { return base + V; }
    DUPLEX_HOST_DEVICE uint32_t q(int stage) const { return base + Q + stage * Rows::BYTES; }
    DUPLEX_HOST_DEVICE uint32_t dout(int stage) const { return base + DOUT + stage * Rows::BYTES; }
    DUPLEX_HOST_DEVICE uint32_t references(int stage) const { return base + SUMS + stage * 2 * SUM_BYTES; }
    DUPLEX_HOST_DEVICE uint32_t deltas(int stage) const { return references(stage) + SUM_BYTES; }
    DUPLEX_HOST_DEVICE uint32_t barrier(int n) const { return base + BARRIERS + 8 * n; }
    DUPLEX_HOST_DEVICE uint32_t keys_full() const { return barrier(0); }
    DUPLEX_HOST_DEVICE uint32_t keys_empty() const { return barrier(1); }
    DUPLEX_HOST_DEVICE uint32_t rows_full(int stage) const { return barrier(2 + stage); }
    DUPLEX_HOST_DEVICE uint32_t rows_empty(int stage) const { return barrier(2 + STAGES + stage); }
  };
};

// All three at once: the shape of dk and dv, whose tile has a share of dq too. dS of all keys of a tile lies in shared
// memory, twice; what a step adds to dq is staged there, by panels of columns a part for each warpgroup.
template <int HEAD_DIM_>
struct FusedShape : KeyShape<HEAD_DIM_> {
  using Base = KeyShape<HEAD_DIM_>;
  using Base::HEAD_DIM, Base::BLOCK_M, Base::BLOCK_N, Base::WARPGROUPS;
  static_assert(!Base::DIVIDED && BLOCK_M == 64);

  using Keys = Tile<BLOCK_N, HEAD_DIM, HEAD_DIM == 128 ? 64 : 32>;
  using Scores = Tile<BLOCK_N, BLOCK_M>;

  // Columns of dq that a warpgroup has, and the first of them.
  DUPLEX_HOST_DEVICE static constexpr int columns(int warpgroup) {
    return (Keys::PANELS + 1 - warpgroup) / 2 * Keys::PANEL;
  }
  DUPLEX_HOST_DEVICE static constexpr int first_column(int warpgroup) { return warpgroup * columns(0); }
  static_assert(columns(0) + columns(1) == HEAD_DIM);
  static constexpr bool EVEN = columns(0) == columns(1);

  static constexpr int SCORES = (Base::SHARED_BYTES + 1023) / 1024 * 1024;
  static constexpr int STAGED = SCORES + 2 * Scores::BYTES;
  static constexpr int FUSED_BARRIERS = STAGED + BLOCK_M * HEAD_DIM * 4;
  static constexpr int SHARED_BYTES = FUSED_BARRIERS + 8 * 2 * WARPGROUPS;
  static_assert(SHARED_BYTES <= 227 * 1024);

  // Full: every warp of the warpgroup has written its numbers. Empty: they have been read.
  struct Shared : Base::Shared {
    using Base::Shared::base;

    DUPLEX_HOST_DEVICE uint32_t k_of(int warpgroup) const {
      return base + Base::K + first_column(warpgroup) / Keys::PANEL * Keys::PANEL_BYTES;
    }
    DUPLEX_HOST_DEVICE uint32_t ds(int buffer) const { return base + SCORES + buffer * Scores::BYTES; }
    DUPLEX_HOST_DEVICE uint32_t staged(int warpgroup) const {
      return base + STAGED + BLOCK_M * first_column(warpgroup) * 4;
    }
    DUPLEX_HOST_DEVICE uint32_t staged_full(int warpgroup) const { return base + FUSED_BARRIERS + 8 * warpgroup; }
    DUPLEX_HOST_DEVICE uint32_t staged_empty(int warpgroup) const { return staged_full(WARPGROUPS + warpgroup); }
  };
};

// dq. By head_dim: keys a block, blocks of keys and of values in flight.
template <int BLOCK_N_, int K_STAGES_, int V_STAGES_>
struct QueryChosen {
  static constexpr int BLOCK_N = BLOCK_N_, K_STAGES = K_STAGES_, V_STAGES = V_STAGES_;
};

template <int HEAD_DIM>
struct QueryChoice;
template <>
struct QueryChoice<64> : QueryChosen<128, 3, 3> {};
template <>
struct QueryChoice<96> : QueryChosen<128, 3, 3> {};
template <>
struct QueryChoice<128> : QueryChosen<128, 2, 2> {};
template <>
struct QueryChoice<192> : QueryChosen<64, 2, 2> {};
template <>
struct QueryChoice<256> : QueryChosen<64, 2, 1> {};

template <int HEAD_DIM_>
struct QueryShape : QueryChoice<HEAD_DIM_>, Warpgroups {
  using QueryChoice<HEAD_DIM_>::BLOCK_N, QueryChoice<HEAD_DIM_>::K_STAGES, QueryChoice<HEAD_DIM_>::V_STAGES;
  static constexpr int HEAD_DIM = HEAD_DIM_, BLOCK_M = 64 * WARPGROUPS;
  static constexpr int LOADER_REGISTERS = 40, COMPUTE_REGISTERS = left_by(LOADER_REGISTERS);
  static_assert(SUM_ROWS % BLOCK_M == 0);

  using Rows = Tile<BLOCK_M, HEAD_DIM>;
  using Keys = Tile<BLOCK_N, HEAD_DIM>;

  static constexpr int Q = 0, DOUT = Q + Rows::BYTES, K = DOUT + Rows::BYTES;
  static constexpr int V = K + K_STAGES * Keys::BYTES;
  static constexpr int BARRIERS = V + V_STAGES * Keys::BYTES;
  static constexpr int SHARED_BYTES = BARRIERS + 8 * (2 + 2 * K_STAGES + 2 * V_STAGES);
  static_assert(SHARED_BYTES <= 227 * 1024);

  struct Shared {
    uint32_t base;

    DUPLEX_HOST_DEVICE uint32_t q() const { return base + Q; }
    DUPLEX_HOST_DEVICE uint32_t dout() const { return base + DOUT; }
    DUPLEX_HOST_DEVICE uint32_t k(int stage) const { return base + K + stage * Keys::BYTES; }
    DUPLEX_HOST_DEVICE uint32_t v(int stage) const { return base + V + stage * Keys::BYTES; }
    DUPLEX_HOST_DEVICE uint32_t barrier(int n) const { return base + BARRIERS + 8 * n; }
    DUPLEX_HOST_DEVICE uint32_t rows_full() const { return barrier(0); }
    DUPLEX_HOST_DEVICE uint32_t rows_empty() const { return barrier(1); }
    DUPLEX_HOST_DEVICE uint32_t k_full(int stage) const { return barrier(2 + stage); }
    DUPLEX_HOST_DEVICE uint32_t k_empty(int stage) const { return barrier(2 + K_STAGES + stage); }
    DUPLEX_HOST_DEVICE uint32_t v_full(int stage) const { return barrier(2 + 2 * K_STAGES + stage); }
    DUPLEX_HOST_DEVICE uint32_t v_empty(int stage) const { return barrier(2 + 2 * K_STAGES + V_STAGES + stage); }
  };
};

}  // namespace duplex::sm90
