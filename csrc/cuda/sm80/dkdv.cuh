// dk and dv for every card from Ampere on. A tile of keys and values stays while the rows that see it pass by, those of
// every query head that shares it, so that nothing is added to memory and the order of sums is fixed. Scores lie with
// keys down: P^T and dS^T are then left operands in registers. The copies of the next rows run under the products of
// these. The formulas are those of sm90/gradients.cuh.
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm80/backward_shape.h"
#include "cuda/sm80/load.cuh"
#include "cuda/sm80/products.cuh"
#include "cuda/softmax.cuh"
#include "cuda/store.cuh"

namespace duplex::sm80 {

// A warp: of dk, of dv, or of both.
template <class T, class S, bool TERMS, bool DK, bool DV>
struct KeyGradients {
  using Rows = typename S::Rows;
  using Keys = typename S::Keys;
  static constexpr int KEY_TILES = S::KEY_TILES, PRODUCTS = S::BLOCK_M / 2, OUT = S::HEAD_DIM / 2;
  static constexpr int STEPS = S::BLOCK_M / 16;

  const BackwardArguments& a;
  const Sources& from;
  int stage = 0;

  // The warp's first key of a tile.
  DUPLEX_DEVICE static int row() { return warp() % (S::BLOCK_N / S::WARP_KEYS) * S::WARP_KEYS; }
  DUPLEX_DEVICE static uint32_t k() { return ptx::shared_base() + S::K; }
  DUPLEX_DEVICE static uint32_t v() { return ptx::shared_base() + S::V; }
  DUPLEX_DEVICE static uint32_t q(int stage) { return ptx::shared_base() + S::Q + stage * Rows::BYTES; }
  DUPLEX_DEVICE static uint32_t dout(int stage) { return ptx::shared_base() + S::DOUT + stage * Rows::BYTES; }
  DUPLEX_DEVICE static uint32_t references(int stage) {
    return ptx::shared_base() + S::SUMS + stage * 2 * S::SUM_BYTES;
  }
  DUPLEX_DEVICE static uint32_t deltas(int stage) { return references(stage) + S::SUM_BYTES; }
  DUPLEX_DEVICE int batch_of(const KeyWork& w) const { return a.lengths.cu_q ? 0 : w.batch; }

  // The t-th block of rows of a query head, or none behind the last head.
  DUPLEX_DEVICE void load_rows(const KeyWork& w, int head, int t, int stage) const {
    if (head < (w.head + 1) * a.group) {
      const int i0 = w.rows.at(t) * S::BLOCK_M, batch = batch_of(w);
      load_tile<Rows, S::THREADS>(q(stage), from.q, batch, w.row_q + i0, head, w.len_q - i0);
      load_tile<Rows, S::THREADS>(dout(stage), from.dout, batch, w.row_q + i0, head, w.len_q - i0);
      const int thread = ptx::anew(ptx::thread_index()), units = S::SUM_BYTES / 16;
      const int64_t at = head * a.sums.head + RowSums::start(a.lengths, w.batch, w.row_q) + i0 + 4 * (thread % units);
      if (thread < units)
        ptx::copy_async<16>(references(stage) + 16 * thread, a.sums.references + at, 16);
      else if (thread < 2 * units)
        ptx::copy_async<16>(deltas(stage) + 16 * (thread - units), a.sums.deltas + at, 16);
    }
    ptx::copy_commit();
  }

  // Of a thread's accumulators 4 g to 4 g + 3, whose columns are two rows, one after the other.
  DUPLEX_DEVICE static void load_pair(uint32_t sums, int g, float (&x)[2]) {
    ptx::shared_load2(sums + 4 * (8 * g + 2 * (lane() % 4)), x);
  }

  // The t-th block of rows of a query head, while the copies of block `next` of `next_head` begin.
  DUPLEX_DEVICE void next_rows(const KeyWork& w, int head, int t, int next_head, int next, bool edge,
                               float (&dk)[KEY_TILES][OUT], float (&dv)[KEY_TILES][OUT]) {
    float x[KEY_TILES][PRODUCTS], dp[KEY_TILES][PRODUCTS];
    uint32_t p[KEY_TILES][STEPS][4];
    ptx::copy_wait<0>();
    ptx::block_sync();
    load_rows(w, next_head, next, stage ^ 1);
    multiply_rows<T, Keys, Rows>(x, k(), row(), q(stage));
    if constexpr (DK) multiply_rows<T, Keys, Rows>(dp, v(), row(), dout(stage));
    const int i = w.rows.at(t) * S::BLOCK_M + 2 * (lane() % 4);
    const float factor = TERMS ? LOG2E : a.terms.scale * LOG2E;
#pragma unroll
    for (int r = 0; r < KEY_TILES; ++r) {
      const int j = first_key(w, r);
      if constexpr (DK) {
#pragma unroll
        for (int g = 0; g < PRODUCTS / 4; ++g) {
          float delta[2];
          load_pair(deltas(stage), g, delta);
#pragma unroll
          for (int n = 0; n < 4; ++n) dp[r][4 * g + n] -= delta[n % 2];
        }
      }
      if constexpr (TERMS)
        add_terms<true>(x[r], a.terms, head, i, j, w.offset, [&](int n, float factor) {
          if constexpr (DK) dp[r][n] *= factor;
        });
      if (edge) hide<true>(x[r], w, i, j);
#pragma unroll
      for (int g = 0; g < PRODUCTS / 4; ++g) {
        float reference[2];
        load_pair(references(stage), g, reference);
#pragma unroll
        for (int n = 0; n < 4; ++n) x[r][4 * g + n] = ptx::exp2(ptx::fma(x[r][4 * g + n], factor, -reference[n % 2]));
      }
    }
    if constexpr (DV) {
#pragma unroll
      for (int r = 0; r < KEY_TILES; ++r) pack_operand<T>(x[r], p[r]);
      multiply_registers<T, Rows>(dv, p, dout(stage));
    }
    if constexpr (DK) {
#pragma unroll
      for (int r = 0; r < KEY_TILES; ++r) {
#pragma unroll
        for (int n = 0; n < PRODUCTS; ++n) dp[r][n] *= x[r][n];
        pack_operand<T>(dp[r], p[r]);
      }
      multiply_registers<T, Rows>(dk, p, q(stage));
    }
    stage ^= 1;
  }

  // The lane's first key of the r-th 16 of the warp.
  DUPLEX_DEVICE int first_key(const KeyWork& w, int r) const { return w.j0 + row() + 16 * r + lane() / 4; }

  DUPLEX_DEVICE void tile(const KeyWork& w) {
    const int count = w.rows.count(), edges = w.rows.edges(), end = (w.head + 1) * a.group;
    float dk[KEY_TILES][OUT], dv[KEY_TILES][OUT];
    if constexpr (DK) set_zero(dk);
    if constexpr (DV) set_zero(dv);
    if (count > 0) {
      const int batch = batch_of(w);
      load_tile<Keys, S::THREADS>(k(), from.k, batch, w.row_k + w.j0, w.head, w.len_k - w.j0);
      load_tile<Keys, S::THREADS>(v(), from.v, batch, w.row_k + w.j0, w.head, w.len_k - w.j0);
      load_rows(w, w.head * a.group, 0, stage);
      for (int head = w.head * a.group, t = 0; head < end;) {
        const int next = t + 1 < count ? t + 1 : 0, next_head = next ? head : head + 1;
        next_rows(w, head, t, next_head, next, t < edges, dk, dv);
        head = next_head;
        t = next;
      }
    }
    store<DK>(a.dk, w, dk, a.head_dim, a.terms.scale);
    store<DV>(a.dv, w, dv, a.head_dim_v, 1);
    ptx::block_sync();  // the next tile's keys and rows come where these are read
  }

  template <bool HAS>
  DUPLEX_DEVICE void store(const duplex::Rows& to, const KeyWork& w, const float (&x)[KEY_TILES][OUT], int columns,
                           float scale) const {
    if constexpr (HAS) {
      const float weight[2] = {scale, scale};
#pragma unroll
      for (int r = 0; r < KEY_TILES; ++r)
        store_rows<T>(to, w.batch, w.row_k, w.head, first_key(w, r), w.len_k, columns, x[r], weight, lane() % 4);
    }
  }

  DUPLEX_DEVICE void run() {
    walk<KeyWork>(a.lengths, a.key_tiles, [&](const KeyWork& w) { tile(w); });
  }
};

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
dkdv_kernel(DUPLEX_PARAMETER BackwardArguments a, DUPLEX_PARAMETER Sources from) {
  if constexpr (!S::DIVIDED)
    KeyGradients<T, S, TERMS, true, true>{a, from}.run();
  else if (ptx::uniform(ptx::thread_index() / 32) < S::WARPS / 2)
    KeyGradients<T, S, TERMS, false, true>{a, from}.run();
  else
    KeyGradients<T, S, TERMS, true, false>{a, from}.run();
}

}  // namespace duplex::sm80
