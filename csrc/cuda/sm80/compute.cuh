// A tile of queries against its blocks of keys. Blocks of keys and of values take turns: each is waited for, and then
// the copies of a later one go into the buffer that all warps are done with, under the products of this one.
// (Dao, "FlashAttention-2", 2023.)
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm80/load.cuh"
#include "cuda/sm80/products.cuh"
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

  // The warp's first row of a tile.
  DUPLEX_DEVICE static int row() { return warp() * S::WARP_ROWS; }
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

  // One more block of keys.
  template <bool EDGE>
  DUPLEX_DEVICE void next_block(const Work& w, int t, int count, float (&out)[ROW_TILES][OUT],
                                Softmax (&softmax)[ROW_TILES]) {
    float x[ROW_TILES][PRODUCTS];
    uint32_t p[ROW_TILES][WEIGHTS][4];
    take_turn<false>(w, t, count);
    multiply_rows<T, Queries, Keys>(x, queries(), row(), place(buffer));
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
    multiply_registers<T, Keys>(out, p, place(buffer));
    end_turn();
  }

  // The lane's first row of the r-th 16 of the warp.
  DUPLEX_DEVICE int first_row(const Work& w, int r) const { return w.i0 + row() + 16 * r + lane() / 4; }

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), edges = w.keys.edges();
    Softmax softmax[ROW_TILES];
    float out[ROW_TILES][OUT];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) softmax[r].start(a.sink, w.head, UNIT, lane() % 4);
    set_zero(out);
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
      const int i = first_row(w, r);
      store_rows<T>(a.rows(), w.batch, w.row_q, w.head, i, w.len_q, a.head_dim_v, out[r], weight, lane() % 4);
      store_lse(a, w, i, lse, lane() % 4);
    }
    ptx::block_sync();  // the next tile's queries and keys come where these are read
  }

  DUPLEX_DEVICE void run() {
    walk<Work>(a.lengths, a.tiles(), [&](const Work& w) { tile(w); });
  }
};

}  // namespace duplex::sm80
