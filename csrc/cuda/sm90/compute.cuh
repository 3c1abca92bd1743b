// The computing warpgroups: each has 64 rows of every tile. While one does its softmax, another's products run (they
// take turns at issuing them), and within each the products with values run under the softmax of the next scores.
// (Shah et al., "FlashAttention-3", 2024.)
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm90/load.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/softmax.cuh"
#include "cuda/store.cuh"

namespace duplex::sm90 {

template <class T, class S, bool TERMS>
struct Compute {
  static constexpr int BARRIER_ALL = 1 + S::WARPGROUPS;  // named barriers; 1 to WARPGROUPS are turns
  static constexpr float UNIT = TERMS ? 1 : LN2;         // of the softmax's references
  static constexpr int PRODUCTS = S::BLOCK_N / 2, OUT = S::HEAD_DIM / 2, WEIGHTS = S::BLOCK_N / 16;

  const ForwardArguments& a;
  const Shared<S> shared;
  const int warpgroup, thread, lane;  // thread: of the warpgroup
  int step = 0, tiles = 0;            // blocks of keys and tiles so far

  DUPLEX_DEVICE Compute(const ForwardArguments& a, Shared<S> shared, int warpgroup, int thread)
      : a(a), shared(shared), warpgroup(warpgroup), thread(thread), lane(thread % 32) {}

  DUPLEX_DEVICE int quad_lane() const { return lane % 4; }
  DUPLEX_DEVICE int stage(int n) const { return n % S::STAGES; }
  DUPLEX_DEVICE int phase(int n) const { return n / S::STAGES & 1; }

  DUPLEX_DEVICE void take_turn() { ptx::named_sync(1 + warpgroup, 256); }
  DUPLEX_DEVICE void pass_turn() { ptx::named_arrive(1 + (warpgroup + 1) % S::WARPGROUPS, 256); }

  // Every warp tells for itself: a wait for products covers the warp's own.
  DUPLEX_DEVICE void release(uint32_t empty) {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  DUPLEX_DEVICE void multiply_keys(float (&x)[PRODUCTS], int n) {
    multiply_rows<T, typename S::Queries, typename S::Keys>(x, shared.q(), 64 * warpgroup, shared.k(stage(n)));
  }

  DUPLEX_DEVICE void multiply_values(float (&out)[OUT], const uint32_t (&p)[WEIGHTS][4], int n, bool accumulate) {
    multiply_registers<T, typename S::Keys>(out, p, shared.v(stage(n)), accumulate);
  }

  // Values past the sequence's last key.
  DUPLEX_DEVICE void clear_strangers(const Work& w, int t, int n) {
    const int live = w.len_k - w.keys.at(t) * S::BLOCK_N;
    if (live >= S::BLOCK_N || w.row_k + w.len_k >= a.lengths.rows_k) return;
    ptx::barrier_wait(shared.v_full(stage(n)), phase(n));
    clear_rows<typename S::Keys>(shared.v(stage(n)), live, 128 * warpgroup + thread, 128 * S::WARPGROUPS);
    ptx::fence_async_proxy();
    ptx::named_sync(BARRIER_ALL, 128 * S::WARPGROUPS);
  }

  // Products to probabilities, these to two numbers a register.
  template <bool EDGE>
  DUPLEX_DEVICE void weigh(float (&x)[PRODUCTS], const Work& w, int t, int i, Softmax& softmax, float (&decay)[2]) {
    const int j = w.keys.at(t) * S::BLOCK_N + 2 * quad_lane();
    if constexpr (TERMS) add_terms<false>(x, a.terms, w.head, i, j, w.offset, [](int, float) {});
    if constexpr (EDGE) hide<false>(x, w, i, j);
    softmax.next<EDGE || TERMS, TERMS>(x, a.terms.scale * LOG2E, decay);
  }

  // One more block of keys: its scores, under which the products of the block before it with their values finish.
  template <bool EDGE>
  DUPLEX_DEVICE void next_block(const Work& w, int t, int count, int i, float (&x)[PRODUCTS], float (&out)[OUT],
                                uint32_t (&p)[WEIGHTS][4], Softmax& softmax) {
    clear_strangers(w, t - 1, step);
    ptx::barrier_wait(shared.k_full(stage(step + 1)), phase(step + 1));
    take_turn();
    ptx::wgmma_fence();
    multiply_keys(x, step + 1);
    ptx::barrier_wait(shared.v_full(stage(step)), phase(step));
    multiply_values(out, p, step, t > 1);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::settle(x);
    release(shared.k_empty(stage(step + 1)));
    if (t == count - 1) release(shared.q_empty());
    float decay[2];
    weigh<EDGE>(x, w, t, i, softmax, decay);
    ptx::wgmma_wait<0>();
    ptx::settle(out);
    ptx::settle(p);
    release(shared.v_empty(stage(step)));
#pragma unroll
    for (int n = 0; n < OUT; ++n) out[n] *= decay[row_of(n)];
    pack_operand<T>(x, p);
    ++step;
  }

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), edges = w.keys.edges();
    const int i = w.i0 + 64 * warpgroup + thread / 32 * 16 + lane / 4;
    Softmax softmax;
    softmax.start(a.sink, w.head, UNIT, quad_lane());
    float out[OUT];
    if (count > 0) {
      float x[PRODUCTS], decay[2];
      uint32_t p[WEIGHTS][4];
      ptx::barrier_wait(shared.q_full(), tiles & 1);
      ptx::barrier_wait(shared.k_full(stage(step)), phase(step));
      take_turn();
      ptx::wgmma_fence();
      multiply_keys(x, step);
      pass_turn();
      ptx::wgmma_wait<0>();
      ptx::settle(x);
      release(shared.k_empty(stage(step)));
      if (count == 1) release(shared.q_empty());
      if (TERMS || edges > 0)
        weigh<true>(x, w, 0, i, softmax, decay);
      else
        weigh<false>(x, w, 0, i, softmax, decay);
      pack_operand<T>(x, p);
      int t = 1;
      for (; t < (TERMS ? count : edges); ++t) next_block<true>(w, t, count, i, x, out, p, softmax);
      if constexpr (!TERMS)
        for (; t < count; ++t) next_block<false>(w, t, count, i, x, out, p, softmax);
      clear_strangers(w, count - 1, step);
      ptx::barrier_wait(shared.v_full(stage(step)), phase(step));
      ptx::wgmma_fence();
      multiply_values(out, p, step, count > 1);
      ptx::wgmma_wait<0>();
      ptx::settle(out);
      release(shared.v_empty(stage(step)));
      ++step;
      ++tiles;
    } else {
#pragma unroll
      for (int n = 0; n < OUT; ++n) out[n] = 0;
    }
    float weight[2], lse[2];
    softmax.finish(UNIT, weight, lse);
    store_rows<T>(a.rows(), w.batch, w.row_q, w.head, i, w.len_q, a.head_dim_v, out, weight, quad_lane());
    store_lse(a, w, i, lse, quad_lane());
  }

  DUPLEX_DEVICE void run() {
    if (warpgroup == S::WARPGROUPS - 1) pass_turn();  // the first to go needs a turn passed to it
    for_each_tile(a.lengths, a.tiles(), [&](const Work& w) { tile(w); });
  }
};

}  // namespace duplex::sm90
