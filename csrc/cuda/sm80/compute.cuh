// A tile of queries against its blocks of keys. Blocks of keys and of values take turns: each is waited for, and then
// the copies of a later one go into the buffer that all warps are done with, under the products of this one.
// (Dao, "FlashAttention-2", 2023.)
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm80/fragments.cuh"
#include "cuda/sm80/load.cuh"
#include "cuda/sm80/shape.h"
#include "cuda/softmax.cuh"
#include "cuda/store.cuh"

namespace duplex::sm80 {

template <class T, class S, bool TERMS>
struct Compute {
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  static constexpr float UNIT = TERMS ? 1 : LN2;  // of the softmax's references
  static constexpr int ROW_TILES = S::ROW_TILES;
  static constexpr int PRODUCTS = S::BLOCK_N / 2, OUT = S::HEAD_DIM / 2, WEIGHTS = S::BLOCK_N / 16;  // of 16 rows

  const ForwardArguments& a;
  const Sources& from;
  int buffer = 0;  // of the block whose turn it is

  DUPLEX_DEVICE static int lane() { return ptx::anew(ptx::thread_index()) % 32; }
  // The warp's first row of a tile.
  DUPLEX_DEVICE static int row() { return ptx::anew(ptx::thread_index()) / 32 * S::WARP_ROWS; }
  DUPLEX_DEVICE static uint32_t queries() { return ptx::shared_base() + S::Q; }
  DUPLEX_DEVICE static uint32_t place(int buffer) { return ptx::shared_base() + S::KEYS + buffer * Keys::BYTES; }

  // Blocks in the order of their turns: of block t of a tile, keys have turn 2 t, values 2 t + 1.
  template <bool VALUES>
  DUPLEX_DEVICE void load_block(const Work& w, int t, int count, int to) {
    const Source& rows = VALUES ? from.v : from.k;
    if (t < count) {
      const int j = w.keys.at(t) * S::BLOCK_N;
      load_tile<Keys, S::THREADS>(place(to), rows, batch_of(w), w.row_k + j, w.head / a.group, w.len_k - j);
    }
    ptx::copy_commit();
  }

  DUPLEX_DEVICE int batch_of(const Work& w) const { return a.lengths.cu_q ? 0 : w.batch; }

  // Brings queries, keys and values of the first turns on their way.
  DUPLEX_DEVICE void begin(const Work& w, int count) {
    load_tile<Queries, S::THREADS>(queries(), from.q, batch_of(w), w.row_q + w.i0, w.head, w.len_q - w.i0);
    buffer = 0;
#pragma unroll
    for (int n = 0; n < S::BUFFERS - 1; ++n)
      n % 2 ? load_block<true>(w, n / 2, count, n) : load_block<false>(w, n / 2, count, n);
  }

  // The next turn begins: its block is there, and the buffer of the one before it is free.
  template <bool VALUES>
  DUPLEX_DEVICE void take_turn(const Work& w, int t, int count) {
    constexpr int AHEAD = S::BUFFERS - 1 + VALUES;
    ptx::copy_wait<S::BUFFERS - 2>();
    ptx::block_sync();
    load_block<AHEAD % 2>(w, t + AHEAD / 2, count, buffer == 0 ? S::BUFFERS - 1 : buffer - 1);
  }
  DUPLEX_DEVICE void end_turn() { buffer = buffer == S::BUFFERS - 1 ? 0 : buffer + 1; }

  DUPLEX_DEVICE void multiply_keys(float (&x)[ROW_TILES][PRODUCTS]) const {
    const int lane = this->lane();
    const auto queries = Fragments<Queries>::down(this->queries() + row() * Queries::ROW_BYTES, lane);
    const auto keys = Fragments<Keys>::across(place(buffer), lane);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) x[r][n] = 0;
#pragma unroll
    for (int k = 0; k < S::HEAD_DIM / 16; ++k) {
      uint32_t q[ROW_TILES][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) ptx::load_matrices(q[r], queries(16 * r, k));
#pragma unroll
      for (int n = 0; n < S::BLOCK_N / 16; ++n) {
        uint32_t b[4];
        ptx::load_matrices(b, keys(16 * n, k));
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          ptx::mma<T>(x[r] + 8 * n, q[r], b[0], b[1]);
          ptx::mma<T>(x[r] + 8 * n + 4, q[r], b[2], b[3]);
        }
      }
    }
  }

  DUPLEX_DEVICE void multiply_values(float (&out)[ROW_TILES][OUT], const uint32_t (&p)[ROW_TILES][WEIGHTS][4]) const {
    const auto values = Fragments<Keys>::down(place(buffer), lane());
#pragma unroll
    for (int k = 0; k < WEIGHTS; ++k)
#pragma unroll
      for (int n = 0; n < S::HEAD_DIM / 16; ++n) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, values(16 * k, n));
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          ptx::mma<T>(out[r] + 8 * n, p[r][k], b[0], b[1]);
          ptx::mma<T>(out[r] + 8 * n + 4, p[r][k], b[2], b[3]);
        }
      }
  }

  // One more block of keys.
  template <bool EDGE>
  DUPLEX_DEVICE void next_block(const Work& w, int t, int count, float (&out)[ROW_TILES][OUT],
                                Softmax (&softmax)[ROW_TILES]) {
    float x[ROW_TILES][PRODUCTS];
    uint32_t p[ROW_TILES][WEIGHTS][4];
    take_turn<false>(w, t, count);
    multiply_keys(x);
    end_turn();
    const int j = w.keys.at(t) * S::BLOCK_N + 2 * (lane() % 4);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int i = first_row(w, r);
      float decay[2];
      if constexpr (TERMS) add_terms<false>(x[r], a.terms, w.head, i, j, w.offset, [](int, float) {});
      if constexpr (EDGE) hide<false>(x[r], w, i, j);
      softmax[r].template next<EDGE || TERMS, TERMS>(x[r], a.terms.scale * LOG2E, decay);
#pragma unroll
      for (int n = 0; n < OUT; ++n) out[r][n] *= decay[row_of(n)];
      pack_operand<T>(x[r], p[r]);
    }
    take_turn<true>(w, t, count);
    multiply_values(out, p);
    end_turn();
  }

  // The lane's first row of the r-th 16 of the warp.
  DUPLEX_DEVICE int first_row(const Work& w, int r) const { return w.i0 + row() + 16 * r + lane() / 4; }

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), edges = w.keys.edges();
    Softmax softmax[ROW_TILES];
    float out[ROW_TILES][OUT];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      softmax[r].start(a.sink, w.head, UNIT, lane() % 4);
#pragma unroll
      for (int n = 0; n < OUT; ++n) out[r][n] = 0;
    }
    if (count > 0) {
      begin(w, count);
      int t = 0;
      for (; t < (TERMS ? count : edges); ++t) next_block<true>(w, t, count, out, softmax);
      if constexpr (!TERMS)
        for (; t < count; ++t) next_block<false>(w, t, count, out, softmax);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      float weight[2], lse[2];
      softmax[r].finish(UNIT, weight, lse);
      store_output<T>(a, w, first_row(w, r), out[r], weight, lse, lane() % 4);
    }
    ptx::block_sync();  // the next tile's queries and keys come where these are read
  }

  DUPLEX_DEVICE void run() {
    for_each_tile(a.lengths, a.tiles(), [&](const Work& w) { tile(w); });
  }
};

}  // namespace duplex::sm80
