// dq for Hopper: rows stay while the blocks of keys that they see pass by, as in the forward. The products of a block's
// dS with its keys run under the scores of the next. With DISTANCES, dS is summed along its diagonals too.
#pragma once

#include "cuda/diagonals.cuh"
#include "cuda/sm90/gradients.cuh"

namespace duplex::sm90 {

// Terms leave no registers for what is read of a ticket: each warp then works out its tiles for itself. What a block
// gets is fixed, which sums of distances, in slots of blocks, need to be deterministic.
template <bool TERMS, bool WARP, class F>
DUPLEX_DEVICE void for_each_tile(const BackwardArguments& a, Tickets<Work> tickets, F&& f) {
  if constexpr (TERMS)
    walk<Work>(a.lengths, a.row_tiles, f);
  else
    tickets.for_each<WARP>(f);
}

template <class S, bool TERMS, bool DISTANCES>
DUPLEX_DEVICE void load_keys(const BackwardArguments& a, const BackwardMaps& maps, typename S::Shared shared,
                             Tickets<Work> tickets) {
  ptx::prefetch(maps.q);
  ptx::prefetch(maps.k);
  ptx::prefetch(maps.v);
  ptx::prefetch(maps.dout);
  uint32_t step = 0, tiles = 0;  // blocks of keys and tiles so far
  for_each_tile<TERMS, false>(a, tickets, [&](const Work& as_handed) {
    const Work w = moved<DISTANCES>(a, as_handed);
    const int count = w.keys.count(), kv_head = w.head / a.group, batch = a.lengths.cu_q ? 0 : w.batch;
    for (int t = 0; t < count; ++t, ++step) {
      const int k = step % S::K_STAGES, v = step % S::V_STAGES, row = w.row_k + w.keys.at(t) * S::BLOCK_N;
      ptx::barrier_wait(shared.k_empty(k), (step / S::K_STAGES & 1) ^ 1);
      load_tile<typename S::Keys>(shared.k(k), maps.k, shared.k_full(k), row, kv_head, batch);
      if (t == 0) {
        const uint32_t full = shared.rows_full();
        ptx::barrier_wait(shared.rows_empty(), (tiles & 1) ^ 1);
        ptx::barrier_expect(full, 2 * S::Rows::BYTES);
        copy_tile<typename S::Rows>(shared.q(), maps.q, full, w.row_q + w.i0, w.head, batch);
        copy_tile<typename S::Rows>(shared.dout(), maps.dout, full, w.row_q + w.i0, w.head, batch);
      }
      ptx::barrier_wait(shared.v_empty(v), (step / S::V_STAGES & 1) ^ 1);
      load_tile<typename S::Keys>(shared.v(v), maps.v, shared.v_full(v), row, kv_head, batch);
    }
    tiles += count > 0;
  });
}

// A computing warpgroup: 64 rows of every tile.
template <class T, class S, bool TERMS, bool DISTANCES>
struct QueryGradients : Gradients<TERMS> {
  using Base = Gradients<TERMS>;
  using Base::a, Base::factor, Base::quad_lane, Base::release, Base::warpgroup, Base::thread, Base::lane;
  static constexpr int PRODUCTS = S::BLOCK_N / 2, OUT = S::HEAD_DIM / 2, STEPS = S::BLOCK_N / 16;
  using Distances = Diagonals<16, S::BLOCK_N>;

  const typename S::Shared shared;
  uint32_t step = 0, tiles = 0;  // blocks of keys and tiles so far
  Ends ends{};

  DUPLEX_DEVICE QueryGradients(const BackwardArguments& a, typename S::Shared shared, int warpgroup, int thread)
      : Base(a, warpgroup, thread), shared(shared) {}

  DUPLEX_DEVICE static int k_stage(uint32_t n) { return n % S::K_STAGES; }
  DUPLEX_DEVICE static int v_stage(uint32_t n) { return n % S::V_STAGES; }
  DUPLEX_DEVICE void wait_for_keys() const { ptx::barrier_wait(shared.k_full(k_stage(step)), step / S::K_STAGES & 1); }
  DUPLEX_DEVICE void wait_for_values() const {
    ptx::barrier_wait(shared.v_full(v_stage(step)), step / S::V_STAGES & 1);
  }

  DUPLEX_DEVICE Team team() const {
    return {shared.base + SHARED_WITH_TICKETS<S, Work> + warpgroup * Distances::BYTES, ptx::anew(thread),
            Base::BARRIER_ALL + 1 + warpgroup};
  }
  DUPLEX_DEVICE int slot() const { return Warpgroups::WARPGROUPS * ptx::block_index() + warpgroup; }

  // Rows past the sequence's last: their dS would else be that of whatever lies there.
  DUPLEX_DEVICE void clear_stranger_rows(const Work& w) {
    const int live = w.len_q - w.i0;
    if (live >= S::BLOCK_M || w.row_q + w.len_q >= a.lengths.rows_q) return;
    this->template clear<typename S::Rows>(shared.q(), live);
    this->template clear<typename S::Rows>(shared.dout(), live);
    this->meet();
  }

  // Keys and values past the sequence's last key.
  DUPLEX_DEVICE void clear_strangers(const Work& w, int j0) {
    const int live = w.len_k - j0;
    if (live >= S::BLOCK_N || w.row_k + w.len_k >= a.lengths.rows_k) return;
    wait_for_values();
    this->template clear<typename S::Keys>(shared.k(k_stage(step)), live);
    this->template clear<typename S::Keys>(shared.v(v_stage(step)), live);
    this->meet();
  }

  // The keys from j0 on.
  DUPLEX_DEVICE void next_keys(const Work& w, int i, int j0, bool edge, bool first, bool last,
                               const float (&reference)[2], const float (&delta)[2], float (&x)[PRODUCTS],
                               float (&dp)[PRODUCTS], uint32_t (&ds)[STEPS][4], float (&dq)[OUT]) {
    typename S::Shared shared = this->shared;
    if constexpr (DISTANCES) shared.base = ptx::anew(int(shared.base));  // operands' addresses would take registers
    const int k = k_stage(step), v = v_stage(step);
    wait_for_keys();
    clear_strangers(w, j0);
    if constexpr (DISTANCES) ptx::forget(x);
    ptx::wgmma_fence();
    multiply_rows<T, typename S::Rows, typename S::Keys>(x, shared.q(), 64 * warpgroup, shared.k(k));
    ptx::wgmma_wait<1>();
    ptx::settle(ds);
    if (!first) release(shared.k_empty(k_stage(step - 1)));
    wait_for_values();
    if constexpr (DISTANCES) ptx::forget(dp);
    ptx::wgmma_fence();
    multiply_rows<T, typename S::Rows, typename S::Keys>(dp, shared.dout(), 64 * warpgroup, shared.v(v));
    ptx::wgmma_wait<!TERMS>();
    ptx::settle(x);
    if constexpr (TERMS) {
      ptx::settle(dp);
#pragma unroll
      for (int n = 0; n < PRODUCTS; ++n) dp[n] -= delta[row_of(n)];
      add_terms<false>(x, a.terms, w.head, i, j0 + 2 * quad_lane(), w.offset, [&](int n, float factor) {
        if constexpr (!DISTANCES) dp[n] *= factor;
      });
    }
    if (edge) hide<false>(x, w, i, j0 + 2 * quad_lane());
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) x[n] = ptx::exp2(ptx::fma(x[n], factor, -reference[row_of(n)]));
    if constexpr (!TERMS) {
      ptx::wgmma_wait<0>();
      ptx::settle(dp);
    }
    release(shared.v_empty(v));
    if (last) release(shared.rows_empty());
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) dp[n] = x[n] * (TERMS ? dp[n] : dp[n] - delta[row_of(n)]);
    pack_operand<T>(dp, ds);
    ptx::wgmma_fence();
    multiply_registers<T, typename S::Keys>(dq, ds, shared.k(k), true);
    if constexpr (DISTANCES) {
      team().meet();
      Distances::add(
          team(), table_of(a.distances, slot(), w.head), j0 - (w.i0 + 64 * warpgroup + w.offset),
          [&](int, int n) { return dp[n]; }, x, dp, ends);
    }
    ++step;
  }

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), edges = w.keys.edges();
    const int i = w.i0 + 64 * warpgroup + thread / 32 * 16 + lane / 4;
    float dq[OUT];
    set_zero(dq);
    if (count > 0) {
      float x[PRODUCTS], dp[PRODUCTS];
      uint32_t ds[STEPS][4];
      const int64_t at = w.head * a.sums.head + RowSums::start(a.lengths, w.batch, w.row_q) + i;
      const float reference[2] = {a.sums.references[at], a.sums.references[at + 8]};
      const float delta[2] = {a.sums.deltas[at], a.sums.deltas[at + 8]};
      ptx::barrier_wait(shared.rows_full(), tiles & 1);
      if constexpr (DISTANCES) clear_stranger_rows(w);
      for (int t = 0; t < count; ++t)
        next_keys(w, i, w.keys.at(t) * S::BLOCK_N, t < edges, t == 0, t == count - 1, reference, delta, x, dp, ds, dq);
      ptx::wgmma_wait<0>();
      ptx::settle(ds);
      release(shared.k_empty(k_stage(step - 1)));
      ++tiles;
      if constexpr (DISTANCES) {
        team().meet();
        Distances::finish(team(), table_of(a.distances, slot(), w.head), ends);
      }
    }
    ptx::settle(dq);
    if (DISTANCES && !a.dq.data) return;
    const float weight[2] = {a.terms.scale, a.terms.scale};
    store_rows<T>(a.dq, w.batch, w.row_q, w.head, i, w.len_q, a.head_dim, dq, weight, quad_lane());
  }

  DUPLEX_DEVICE void run(Tickets<Work> tickets) {
    if constexpr (DISTANCES) clear_slot(a.distances, slot(), thread);
    for_each_tile<TERMS, true>(a, tickets, [&](const Work& w) { tile(moved<DISTANCES>(a, w)); });
  }
};

template <class T, class S, bool TERMS, bool DISTANCES>
DUPLEX_KERNEL(S::THREADS)
dq_kernel(DUPLEX_PARAMETER BackwardArguments a, DUPLEX_PARAMETER BackwardMaps maps) {
  const typename S::Shared shared{ptx::shared_base()};
  const auto tickets = tickets_of<S, Work>(shared.base);
  if (ptx::thread_index() == 0) {
    ptx::barrier_init(shared.rows_full(), 1);
    ptx::barrier_init(shared.rows_empty(), S::WARPS);
    for (int n = 0; n < S::K_STAGES; ++n) {
      ptx::barrier_init(shared.k_full(n), 1);
      ptx::barrier_init(shared.k_empty(n), S::WARPS);
    }
    for (int n = 0; n < S::V_STAGES; ++n) {
      ptx::barrier_init(shared.v_full(n), 1);
      ptx::barrier_init(shared.v_empty(n), S::WARPS);
    }
    tickets.init(1 + S::WARPS);
    ptx::barrier_init_fence();
  }
  ptx::wait_for_launch_before();
  ptx::block_sync();
  using Compute = QueryGradients<T, S, TERMS, DISTANCES>;
  divide_roles<TERMS ? 1 : 2, S>(
      [&](int mover) {
        if (mover == 0)
          load_keys<S, TERMS, DISTANCES>(a, maps, shared, tickets);
        else
          hand_out(a.lengths, a.row_tiles, tickets);
      },
      [&](int warpgroup, int thread) { Compute(a, shared, warpgroup, thread).run(tickets); });
}

}  // namespace duplex::sm90
