// A tile of keys and values stays while the rows that see it pass by, those of every query head that shares it. Scores
// lie with keys down: P^T and dS^T are then left operands in registers. The products with rows of a step run under the
// scores of the next.
#pragma once

#include "cuda/sm90/gradients.cuh"

namespace duplex::sm90 {

template <class S>
DUPLEX_DEVICE void init_barriers(typename S::Shared shared) {
  ptx::barrier_init(shared.keys_full(), 1);
  ptx::barrier_init(shared.keys_empty(), S::WARPS);
  for (int n = 0; n < S::STAGES; ++n) {
    ptx::barrier_init(shared.rows_full(n), 1);
    ptx::barrier_init(shared.rows_empty(n), S::WARPS);
  }
}

// f(head, i0) for each block of rows that a tile of keys meets.
template <class S, class F>
DUPLEX_DEVICE void for_each_block_of_rows(const BackwardArguments& a, const KeyWork& w, F&& f) {
  const int count = w.rows.count();
  for (int head = w.head * a.group; head < (w.head + 1) * a.group; ++head)
    for (int t = 0; t < count; ++t) f(head, w.rows.at(t) * S::BLOCK_M);
}

template <class S>
DUPLEX_DEVICE void load_rows(const BackwardArguments& a, const BackwardMaps& maps, typename S::Shared shared,
                             Tickets<KeyWork> tickets) {
  ptx::prefetch(maps.q);
  ptx::prefetch(maps.k);
  ptx::prefetch(maps.v);
  ptx::prefetch(maps.dout);
  uint32_t step = 0, tiles = 0;  // blocks of rows and tiles so far
  tickets.for_each<false>([&](const KeyWork& w) {
    const int batch = a.lengths.cu_q ? 0 : w.batch;
    if (w.rows.count() == 0) return;
    ptx::barrier_wait(shared.keys_empty(), (tiles++ & 1) ^ 1);
    ptx::barrier_expect(shared.keys_full(), 2 * S::Keys::BYTES);
    copy_tile<typename S::Keys>(shared.k(), maps.k, shared.keys_full(), w.row_k + w.j0, w.head, batch);
    copy_tile<typename S::Keys>(shared.v(), maps.v, shared.keys_full(), w.row_k + w.j0, w.head, batch);
    const int64_t sums = RowSums::start(a.lengths, w.batch, w.row_q);
    for_each_block_of_rows<S>(a, w, [&](int head, int i0) {
      const int stage = step % S::STAGES;
      const uint32_t full = shared.rows_full(stage);
      ptx::barrier_wait(shared.rows_empty(stage), (step / S::STAGES & 1) ^ 1);
      ptx::barrier_expect(full, 2 * S::Rows::BYTES + 2 * S::SUM_BYTES);
      copy_tile<typename S::Rows>(shared.q(stage), maps.q, full, w.row_q + i0, head, batch);
      copy_tile<typename S::Rows>(shared.dout(stage), maps.dout, full, w.row_q + i0, head, batch);
      const int64_t at = head * a.sums.head + sums + i0;
      ptx::copy_bytes(shared.references(stage), a.sums.references + at, S::SUM_BYTES, full);
      ptx::copy_bytes(shared.deltas(stage), a.sums.deltas + at, S::SUM_BYTES, full);
      ++step;
    });
  });
}

// A computing warpgroup: of dk, of dv, or of both; and, of dq, of the tile's share of so many columns (FusedShape).
template <class T, class S, bool TERMS, bool DK, bool DV, int DQ_COLUMNS = 0>
struct KeyGradients : Gradients<TERMS> {
  using Base = Gradients<TERMS>;
  using Base::a, Base::factor, Base::quad_lane, Base::release, Base::warpgroup, Base::thread, Base::lane;
  using Base::BARRIER_SCORES;
  static constexpr int PRODUCTS = S::BLOCK_M / 2, OUT = S::HEAD_DIM / 2, STEPS = S::BLOCK_M / 16;
  static constexpr bool DQ = DQ_COLUMNS > 0;

  const typename S::Shared shared;
  const int row;                 // of the tile of keys, where the warpgroup's 64 begin
  uint32_t step = 0, tiles = 0;  // blocks of rows and tiles so far

  DUPLEX_DEVICE KeyGradients(const BackwardArguments& a, typename S::Shared shared, int warpgroup, int thread)
      : Base(a, warpgroup, thread), shared(shared), row(S::DIVIDED ? 0 : 64 * warpgroup) {}

  DUPLEX_DEVICE int stage(uint32_t n) const { return n % S::STAGES; }
  DUPLEX_DEVICE int phase(uint32_t n) const { return n / S::STAGES & 1; }

  // Rows past the sequence's last.
  DUPLEX_DEVICE void clear_strangers(const KeyWork& w, int i0) {
    const int live = w.len_q - i0;
    if (live >= S::BLOCK_M || w.row_q + w.len_q >= a.lengths.rows_q) return;
    this->template clear<typename S::Rows>(shared.q(stage(step)), live);
    this->template clear<typename S::Rows>(shared.dout(stage(step)), live);
    this->meet();
  }

  // Keys and values past the sequence's last: dq sums over all of the tile.
  DUPLEX_DEVICE void clear_strange_keys(const KeyWork& w) const {
    const int live = w.len_k - w.j0;
    if (live >= S::BLOCK_N || w.row_k + w.len_k >= a.lengths.rows_k) return;
    this->template clear<typename S::Keys>(shared.k(), live);
    this->template clear<typename S::Keys>(shared.v(), live);
    this->meet();
  }

  // One number of each row that the thread has columns of; accumulator n belongs to row_of_column(n). They are loaded
  // while products go on, but where terms of scores take the registers.
  using RowNumbers = float[PRODUCTS / 2];
  DUPLEX_DEVICE static constexpr int row_of_column(int n) { return n / 4 * 2 + n % 2; }
  DUPLEX_DEVICE void load(uint32_t sums, RowNumbers& x) const {
#pragma unroll
    for (int g = 0; g < PRODUCTS / 4; ++g) {
      float pair[2];
      ptx::shared_load2(sums + 4 * (8 * g + 2 * quad_lane()), pair);
      x[2 * g] = pair[0], x[2 * g + 1] = pair[1];
    }
  }

  DUPLEX_DEVICE void subtract(float (&dp)[PRODUCTS], const RowNumbers& deltas) const {
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) dp[n] -= deltas[row_of_column(n)];
  }

  DUPLEX_DEVICE void weigh(float (&x)[PRODUCTS], const RowNumbers& references) const {
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) x[n] = ptx::exp2(ptx::fma(x[n], factor, -references[row_of_column(n)]));
  }

  // dS^T of the warpgroup's keys to where both warpgroups read that of all. They have waited for the products with one
  // when they meet over the next, so two buffers are enough.
  DUPLEX_DEVICE void share(const uint32_t (&ds)[STEPS][4]) const {
    const int key = row + thread / 32 * 16 + lane % 16;  // of which the lane stores rows 16 n + 8 * (lane / 16) and on
    const uint32_t to = shared.ds(step % 2) + swizzled(key, lane / 16, S::Scores::ROW_BYTES);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) ptx::store_matrices(to ^ 32 * n, ds[n]);
    ptx::fence_async_proxy();
    ptx::named_sync(BARRIER_SCORES, 128 * S::WARPGROUPS);
  }

  // What the step adds to dq, to where a reduction takes it from: all threads' accumulators by fours.
  DUPLEX_DEVICE void hand_over(const float (&dq)[DQ_COLUMNS / 2]) const {
    const uint32_t to = shared.staged(warpgroup) + 16 * thread;
    ptx::barrier_wait(shared.staged_empty(warpgroup), (step & 1) ^ 1);
#pragma unroll
    for (int n = 0; n < DQ_COLUMNS / 8; ++n)
      ptx::shared_store16(to + 128 * 16 * n, {ptx::bits_of(dq[4 * n]), ptx::bits_of(dq[4 * n + 1]),
                                              ptx::bits_of(dq[4 * n + 2]), ptx::bits_of(dq[4 * n + 3])});
    ptx::fence_async_proxy();
    ptx::warp_sync();
    release(shared.staged_full(warpgroup));
  }

  // dS K, and dS^T q on top of dk. The first is handed over while the second goes on.
  DUPLEX_DEVICE void multiply_shared(float (&dk)[OUT]) const {
    using Scores = typename S::Scores;
    const uint32_t ds = shared.ds(step % 2);
    float dq[DQ_COLUMNS / 2];
    ptx::wgmma_fence();
    multiply_columns<T, Scores, typename S::Keys>(dq, ds, shared.k_of(warpgroup));
    add_product<T, Scores, typename S::Rows>(dk, ds, row, shared.q(stage(step)));
    ptx::wgmma_wait<1>();
    ptx::settle(dq);
    hand_over(dq);
  }

  // The rows from i0 on of a query head.
  DUPLEX_DEVICE void next_rows(const KeyWork& w, int head, int i0, bool edge, bool first, bool last,
                               float (&x)[PRODUCTS], float (&dp)[PRODUCTS], uint32_t (&p)[STEPS][4],
                               uint32_t (&ds)[STEPS][4], float (&dk)[OUT], float (&dv)[OUT]) {
    const int at = stage(step);
    ptx::barrier_wait(shared.rows_full(at), phase(step));
    clear_strangers(w, i0);
    ptx::wgmma_fence();
    multiply_rows<T, typename S::Keys, typename S::Rows>(x, shared.k(), row, shared.q(at));
    ptx::wgmma_wait<1>();
    if constexpr (DV) ptx::settle(p);
    if constexpr (DK && !DQ) ptx::settle(ds);
    if (!first) release(shared.rows_empty(stage(step - 1)));
    if constexpr (DK) {
      ptx::wgmma_fence();
      multiply_rows<T, typename S::Keys, typename S::Rows>(dp, shared.v(), row, shared.dout(at));
    }
    RowNumbers references, deltas;
    if constexpr (!TERMS) load(shared.references(at), references);
    ptx::wgmma_wait<DK && !TERMS>();
    ptx::settle(x);
    if constexpr (TERMS && DK) {
      ptx::settle(dp);
      load(shared.deltas(at), deltas);
      subtract(dp, deltas);
    }
    const int i = i0 + 2 * quad_lane(), j = w.j0 + row + thread / 32 * 16 + lane / 4;
    if constexpr (TERMS)
      add_terms<true>(x, a.terms, head, i, j, w.offset, [&](int n, float factor) {
        if constexpr (DK) dp[n] *= factor;
      });
    if (edge) hide<true>(x, w, i, j);
    if constexpr (TERMS) load(shared.references(at), references);
    weigh(x, references);
    if constexpr (DV) {
      pack_operand<T>(x, p);
      ptx::wgmma_fence();
      multiply_registers<T, typename S::Rows>(dv, p, shared.dout(at), true);
    }
    if constexpr (DK) {
      if constexpr (!TERMS) {
        load(shared.deltas(at), deltas);
        ptx::wgmma_wait<DV>();
        ptx::settle(dp);
        subtract(dp, deltas);
      }
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) dp[n] *= x[n];
      pack_operand<T>(dp, ds);
      if constexpr (DQ) {
        share(ds);
        multiply_shared(dk);
      } else {
        ptx::wgmma_fence();
        multiply_registers<T, typename S::Rows>(dk, ds, shared.q(at), true);
      }
    }
    if (last && !DQ) release(shared.keys_empty());
    ++step;
  }

  DUPLEX_DEVICE void tile(const KeyWork& w) {
    const int count = w.rows.count(), edges = w.rows.edges();
    const bool ragged = DQ && w.j0 + S::BLOCK_N > w.len_k;  // what is no key must weigh nothing
    float dk[OUT], dv[OUT];
    if constexpr (DK) set_zero(dk);
    if constexpr (DV) set_zero(dv);
    if (count > 0) {
      float x[PRODUCTS], dp[PRODUCTS];
      uint32_t p[STEPS][4], ds[STEPS][4];
      ptx::barrier_wait(shared.keys_full(), tiles & 1);
      if constexpr (DQ) clear_strange_keys(w);
      for (int h = 0; h < a.group; ++h)
        for (int t = 0; t < count; ++t)
          next_rows(w, w.head * a.group + h, w.rows.at(t) * S::BLOCK_M, t < edges || ragged, h + t == 0,
                    h == a.group - 1 && t == count - 1, x, dp, p, ds, dk, dv);
      ptx::wgmma_wait<0>();
      if constexpr (DV) ptx::settle(p);
      if constexpr (DK && !DQ) ptx::settle(ds);
      release(shared.rows_empty(stage(step - 1)));
      if constexpr (DQ) release(shared.keys_empty());
      ++tiles;
    }
    const int j = w.j0 + row + thread / 32 * 16 + lane / 4;
    if constexpr (DK) {
      ptx::settle(dk);
      const float weight[2] = {a.terms.scale, a.terms.scale};
      store_rows<T>(a.dk, w.batch, w.row_k, w.head, j, w.len_k, a.head_dim, dk, weight, quad_lane());
    }
    if constexpr (DV) {
      ptx::settle(dv);
      const float weight[2] = {1, 1};
      store_rows<T>(a.dv, w.batch, w.row_k, w.head, j, w.len_k, a.head_dim_v, dv, weight, quad_lane());
    }
  }

  DUPLEX_DEVICE void run(Tickets<KeyWork> tickets) {
    tickets.for_each<true>([&](const KeyWork& w) { tile(w); });
  }
};

}  // namespace duplex::sm90
