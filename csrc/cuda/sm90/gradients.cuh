// What the computing warpgroups of the backward kernels share. From log-sum-exps the probabilities are recomputed
// (Dao, "FlashAttention-2", 2023); delta is rowsum(dout * out) - dlse:
//
//    dv = P^T dout     dP = dout v^T     dS = P * (dP - delta)     dq = scale * dS k     dk = scale * dS^T q
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/sm90/backward_shape.h"
#include "cuda/sm90/load.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/softmax.cuh"
#include "cuda/store.cuh"

namespace duplex::sm90 {

struct BackwardMaps {
  ptx::TensorMap q, k, v, dout;
};

template <bool TERMS>
struct Gradients {
  static constexpr int BARRIER_ALL = 1, BARRIER_SCORES = 2;  // named barriers of the computing warpgroups

  const BackwardArguments& a;
  const int warpgroup, thread, lane;  // thread: of the warpgroup
  const float factor;                 // of what add_terms leaves, or of products, to exponents of 2

  DUPLEX_DEVICE Gradients(const BackwardArguments& a, int warpgroup, int thread)
      : a(a), warpgroup(warpgroup), thread(thread), lane(thread % 32), factor(TERMS ? LOG2E : a.terms.scale * LOG2E) {}

  DUPLEX_DEVICE int quad_lane() const { return lane % 4; }

  // Every warp tells for itself: a wait for products covers the warp's own.
  DUPLEX_DEVICE void release(uint32_t empty) const {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  template <class Tile>
  DUPLEX_DEVICE void clear(uint32_t tile, int live) const {
    clear_rows<Tile>(tile, live, 128 * warpgroup + thread, 128 * Warpgroups::WARPGROUPS);
  }

  // After what was cleared.
  DUPLEX_DEVICE void meet() const {
    ptx::fence_async_proxy();
    ptx::named_sync(BARRIER_ALL, 128 * Warpgroups::WARPGROUPS);
  }
};

template <int COUNT>
DUPLEX_DEVICE void set_zero(float (&x)[COUNT]) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n) x[n] = 0;
}

// What a block does at its start. The loader is one thread, which keeps bulk copies in flight; beside it other warps of
// its warpgroup may have a thread that does the like.
template <int MOVERS, class S, class M, class C>
DUPLEX_DEVICE void divide_roles(M&& move, C&& compute) {
  const int warpgroup = ptx::uniform(ptx::thread_index() / 128);
  if (warpgroup == 0) {
    ptx::fewer_registers<S::LOADER_REGISTERS>();
    const int warp = ptx::uniform(ptx::thread_index() / 32);
    if (warp < MOVERS && ptx::elect()) move(warp);
  } else {
    ptx::more_registers<S::COMPUTE_REGISTERS>();
    compute(warpgroup - 1, ptx::thread_index() % 128);
  }
}

}  // namespace duplex::sm90
