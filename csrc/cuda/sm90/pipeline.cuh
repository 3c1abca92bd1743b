// The computing warpgroups of a forward: each has 64 rows of every tile. While one does its softmax, another's products
// run (they take turns at issuing them, or, where exponentials take as long, at these), and within each the products
// with values run under the softmax of the next scores. (Shah et al., "FlashAttention-3", 2024.)
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/shape.h"
#include "cuda/softmax.cuh"

namespace duplex::sm90 {

// By one thread, before the others come. `factor` is that of scores in exponents.
template <class S>
DUPLEX_DEVICE void prepare(Shared<S> shared, float factor) {
  ptx::shared_store(shared.factor(), factor);
  constexpr int WARPS = 4 * S::WARPGROUPS;
  for (int n = 0; n < S::Q_STAGES; ++n) {
    ptx::barrier_init(shared.q_full(n), 1);
    ptx::barrier_init(shared.q_empty(n), WARPS);
  }
  for (int n = 0; n < S::STAGES; ++n) {
    ptx::barrier_init(shared.k_full(n), 1);
    ptx::barrier_init(shared.k_empty(n), WARPS);
    ptx::barrier_init(shared.v_full(n), 1);
    ptx::barrier_init(shared.v_empty(n), WARPS);
  }
}

template <class T, class S>
struct Pipeline {
  static constexpr int BARRIER_ALL = 1 + S::WARPGROUPS;  // named barriers; 1 to WARPGROUPS are turns
  static constexpr int PRODUCTS = S::BLOCK_N / 2, OUT = S::HEAD_DIM / 2, WEIGHTS = S::BLOCK_N / 16;

  const Shared<S> shared;
  const int warpgroup, thread, lane;  // thread: of the warpgroup
  uint32_t step = 0;                  // blocks of keys so far
  int q_stage = 0;                    // of the tile's queries

  DUPLEX_DEVICE Pipeline(Shared<S> shared, int warpgroup, int thread)
      : shared(shared), warpgroup(warpgroup), thread(thread), lane(thread % 32) {}

  DUPLEX_DEVICE int quad_lane() const { return lane % 4; }
  DUPLEX_DEVICE int row() const {
    return 64 * warpgroup + thread / 32 * 16 + lane / 4;
  }  // the thread's first of a tile
  DUPLEX_DEVICE int stage(uint32_t n) const { return n % S::STAGES; }
  DUPLEX_DEVICE int phase(uint32_t n) const { return n / S::STAGES & 1; }

  // Of the warpgroups, at what the shape says.
  DUPLEX_DEVICE void take_turn(bool never = false) const { ptx::named_sync(1 + warpgroup + never, 256); }
  DUPLEX_DEVICE void pass_turn(bool never = false) const {
    ptx::named_arrive(1 + (warpgroup + 1) % S::WARPGROUPS + never, 256);
  }
  DUPLEX_DEVICE void begin_products() const {
    if constexpr (S::TURNS == Turns::AT_PRODUCTS) take_turn();
  }
  DUPLEX_DEVICE void end_products() const {
    if constexpr (S::TURNS == Turns::AT_PRODUCTS) pass_turn();
  }
  struct Exponentials {
    const Pipeline& pipeline;

    DUPLEX_DEVICE float take(float factor, bool never) const {
      if constexpr (S::TURNS != Turns::AT_EXPONENTIALS) return factor;
      pipeline.take_turn(never);
      return ptx::shared_load_float(pipeline.shared.factor());
    }
    DUPLEX_DEVICE void pass(bool never) const {
      if constexpr (S::TURNS == Turns::AT_EXPONENTIALS) pipeline.pass_turn(never);
    }
  };
  // Before the first tile: who goes first needs a turn passed to it.
  DUPLEX_DEVICE void open() {
    if (warpgroup == S::WARPGROUPS - 1) pass_turn();
  }

  // Every warp tells for itself: a wait for products covers the warp's own.
  DUPLEX_DEVICE void release(uint32_t empty) {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  DUPLEX_DEVICE void multiply_keys(float (&x)[PRODUCTS], int n) {
    multiply_rows<T, typename S::Queries, typename S::Keys>(x, shared.q(q_stage), 64 * warpgroup, shared.k(stage(n)));
  }

  DUPLEX_DEVICE void multiply_values(float (&out)[OUT], const uint32_t (&p)[WEIGHTS][4], int n, bool accumulate) {
    multiply_registers<T, typename S::Keys>(out, p, shared.v(stage(n)), accumulate);
  }

  // Of the present step's values, those from the live-th on.
  DUPLEX_DEVICE void clear_strangers(int live) {
    if (live >= S::BLOCK_N) return;
    ptx::barrier_wait(shared.v_full(stage(step)), phase(step));
    clear_rows<typename S::Keys>(shared.v(stage(step)), live, 128 * warpgroup + thread, 128 * S::WARPGROUPS);
    ptx::fence_async_proxy();
    ptx::named_sync(BARRIER_ALL, 128 * S::WARPGROUPS);
  }

  // The sums of values, by weights, over `count` blocks of keys, one at least, of which the first `edges` are edges.
  // weigh.operator()<EDGE>(x, t, decay) turns block t's products into weights; live(t) is how many of its keys belong
  // to the sequence, or more; done() comes when queries have been read for the last time.
  template <bool ALL_EDGES, class Weigh, class Live, class Done>
  DUPLEX_DEVICE void sum_values(int count, int edges, float (&out)[OUT], Weigh&& weigh, Live&& live, Done&& done) {
    float x[PRODUCTS], decay[2];
    uint32_t p[WEIGHTS][4];
    ptx::barrier_wait(shared.k_full(stage(step)), phase(step));
    begin_products();
    ptx::wgmma_fence();
    multiply_keys(x, step);
    end_products();
    ptx::wgmma_wait<0>();
    ptx::settle(x);
    release(shared.k_empty(stage(step)));
    if (count == 1) done();
    if (ALL_EDGES || edges > 0)
      weigh.template operator()<true>(x, 0, decay);
    else
      weigh.template operator()<false>(x, 0, decay);
    pack_operand<T>(x, p);
    // One more block: its scores, under which the products of the block before it with their values finish.
    const auto next = [&]<bool EDGE>(int t) {
      clear_strangers(live(t - 1));
      ptx::barrier_wait(shared.k_full(stage(step + 1)), phase(step + 1));
      begin_products();
      ptx::wgmma_fence();
      multiply_keys(x, step + 1);
      ptx::barrier_wait(shared.v_full(stage(step)), phase(step));
      ptx::wgmma_fence();
      multiply_values(out, p, step, t > 1);
      end_products();
      ptx::wgmma_wait<1>();
      ptx::settle(x);
      release(shared.k_empty(stage(step + 1)));
      if (t == count - 1) done();
      weigh.template operator()<EDGE>(x, t, decay);
      ptx::wgmma_wait<0>();
      ptx::settle(out);
      ptx::settle(p);
      release(shared.v_empty(stage(step)));
#pragma unroll
      for (int n = 0; n < OUT; ++n) out[n] *= decay[row_of(n)];
      pack_operand<T>(x, p);
      ++step;
    };
    int t = 1;
    for (; t < (ALL_EDGES ? count : edges); ++t) next.template operator()<true>(t);
    if constexpr (!ALL_EDGES)
      for (; t < count; ++t) next.template operator()<false>(t);
    clear_strangers(live(count - 1));
    ptx::barrier_wait(shared.v_full(stage(step)), phase(step));
    ptx::wgmma_fence();
    multiply_values(out, p, step, count > 1);
    ptx::wgmma_wait<0>();
    ptx::settle(out);
    release(shared.v_empty(stage(step)));
    ++step;
  }
};

}  // namespace duplex::sm90
