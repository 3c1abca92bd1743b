// dq for every card from Ampere on: rows stay while the blocks of keys that they see pass by, as in the forward. The
// copies of the next block's keys and values run under the products of this one. The formulas are those of
// sm90/gradients.cuh. With DISTANCES, dS is summed along its diagonals too.
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/diagonals.cuh"
#include "cuda/sm80/backward_shape.h"
#include "cuda/sm80/load.cuh"
#include "cuda/sm80/products.cuh"
#include "cuda/softmax.cuh"
#include "cuda/store.cuh"

namespace duplex::sm80 {

template <class T, class S, bool TERMS, bool DISTANCES>
struct QueryGradients {
  using Rows = typename S::Rows;
  using Keys = typename S::Keys;
  static constexpr int ROW_TILES = S::ROW_TILES, PRODUCTS = S::BLOCK_N / 2, OUT = S::HEAD_DIM / 2;
  static constexpr int STEPS = S::BLOCK_N / 16;
  using Distances = Diagonals<S::WARP_ROWS, S::BLOCK_N>;

  const BackwardArguments& a;
  const Sources& from;
  int stage = 0;
  Ends ends{};

  DUPLEX_DEVICE static int row() { return warp() * S::WARP_ROWS; }  // the warp's first of a tile
  DUPLEX_DEVICE static uint32_t q() { return ptx::shared_base() + S::Q; }
  DUPLEX_DEVICE static uint32_t dout() { return ptx::shared_base() + S::DOUT; }
  DUPLEX_DEVICE static uint32_t k(int stage) { return ptx::shared_base() + S::K + stage * Keys::BYTES; }
  DUPLEX_DEVICE static uint32_t v(int stage) { return ptx::shared_base() + S::V + stage * Keys::BYTES; }
  DUPLEX_DEVICE static Team team() { return {ptx::shared_base() + S::SHARED_BYTES, ptx::anew(ptx::thread_index()), 0}; }
  DUPLEX_DEVICE int batch_of(const Work& w) const { return a.lengths.cu_q ? 0 : w.batch; }

  DUPLEX_DEVICE void load_keys(const Work& w, int t, int count, int stage) const {
    if (t < count) {
      const int j0 = w.keys.at(t) * S::BLOCK_N, head = w.head / a.group, batch = batch_of(w);
      load_tile<Keys, S::THREADS>(k(stage), from.k, batch, w.row_k + j0, head, w.len_k - j0);
      load_tile<Keys, S::THREADS>(v(stage), from.v, batch, w.row_k + j0, head, w.len_k - j0);
    }
    ptx::copy_commit();
  }

  // The t-th block of keys.
  DUPLEX_DEVICE void next_keys(const Work& w, int t, int count, bool edge, const float (&reference)[ROW_TILES][2],
                               const float (&delta)[ROW_TILES][2], float (&dq)[ROW_TILES][OUT]) {
    float x[ROW_TILES][PRODUCTS], dp[ROW_TILES][PRODUCTS];
    uint32_t ds[ROW_TILES][STEPS][4];
    ptx::copy_wait<0>();
    ptx::block_sync();
    load_keys(w, t + 1, count, stage ^ 1);
    multiply_rows<T, Rows, Keys>(x, q(), row(), k(stage));
    multiply_rows<T, Rows, Keys>(dp, dout(), row(), v(stage));
    const int j = w.keys.at(t) * S::BLOCK_N + 2 * (lane() % 4);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int i = first_row(w, r);
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) dp[r][n] -= delta[r][row_of(n)];
      if constexpr (TERMS)
        add_terms<false>(x[r], a.terms, w.head, i, j, w.offset, [&](int n, float factor) {
          if constexpr (!DISTANCES) dp[r][n] *= factor;
        });
      if (edge) hide<false>(x[r], w, i, j);
      const float factor = TERMS ? LOG2E : a.terms.scale * LOG2E;
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) dp[r][n] *= ptx::exp2(ptx::fma(x[r][n], factor, -reference[r][row_of(n)]));
      pack_operand<T>(dp[r], ds[r]);
    }
    if constexpr (DISTANCES)
      Distances::add(
          team(), table_of(a.distances, ptx::block_index(), w.head), w.keys.at(t) * S::BLOCK_N - (w.i0 + w.offset),
          [&](int r, int n) { return dp[r][n]; }, x[0], dp[0], ends);
    multiply_registers<T, Keys>(dq, ds, k(stage));
    stage ^= 1;
  }

  // The lane's first row of the r-th 16 of the warp.
  DUPLEX_DEVICE int first_row(const Work& w, int r) const { return w.i0 + row() + 16 * r + lane() / 4; }

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), edges = w.keys.edges();
    float dq[ROW_TILES][OUT];
    set_zero(dq);
    if (count > 0) {
      load_tile<Rows, S::THREADS>(q(), from.q, batch_of(w), w.row_q + w.i0, w.head, w.len_q - w.i0);
      load_tile<Rows, S::THREADS>(dout(), from.dout, batch_of(w), w.row_q + w.i0, w.head, w.len_q - w.i0);
      load_keys(w, 0, count, stage);
      float reference[ROW_TILES][2], delta[ROW_TILES][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int64_t at =
              w.head * a.sums.head + RowSums::start(a.lengths, w.batch, w.row_q) + first_row(w, r) + 8 * n;
          reference[r][n] = a.sums.references[at];
          delta[r][n] = a.sums.deltas[at];
        }
      for (int t = 0; t < count; ++t) next_keys(w, t, count, t < edges, reference, delta, dq);
    }
    const float weight[2] = {a.terms.scale, a.terms.scale};
    if (!DISTANCES || a.dq.data) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
        store_rows<T>(a.dq, w.batch, w.row_q, w.head, first_row(w, r), w.len_q, a.head_dim, dq[r], weight, lane() % 4);
    }
    ptx::block_sync();  // the next tile's rows and keys come where these are read
    if constexpr (DISTANCES)
      if (count > 0) Distances::finish(team(), table_of(a.distances, ptx::block_index(), w.head), ends);
  }

  DUPLEX_DEVICE void run() {
    if constexpr (DISTANCES) clear_slot(a.distances, ptx::block_index(), ptx::thread_index());
    walk<Work>(a.lengths, a.row_tiles, [&](const Work& w) { tile(moved<DISTANCES>(a, w)); });
  }
};

template <class T, class S, bool TERMS, bool DISTANCES>
DUPLEX_KERNEL(S::THREADS)
dq_kernel(DUPLEX_PARAMETER BackwardArguments a, DUPLEX_PARAMETER Sources from) {
  QueryGradients<T, S, TERMS, DISTANCES>{a, from}.run();
}

}  // namespace duplex::sm80
