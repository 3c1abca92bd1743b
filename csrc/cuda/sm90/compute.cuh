// The computing warpgroups of the forward, tile by tile.
#pragma once

#include "cuda/sm90/load.cuh"
#include "cuda/sm90/pipeline.cuh"
#include "cuda/store.cuh"

namespace duplex::sm90 {

template <class T, class S, bool TERMS>
struct Compute : Pipeline<T, S> {
  using Base = Pipeline<T, S>;
  using Base::shared, Base::quad_lane, Base::release;
  static constexpr float UNIT = TERMS ? 1 : LN2;  // of the softmax's references

  const ForwardArguments& a;
  uint32_t tiles = 0;  // so far

  DUPLEX_DEVICE Compute(const ForwardArguments& a, Shared<S> shared, int warpgroup, int thread)
      : Base(shared, warpgroup, thread), a(a) {}

  DUPLEX_DEVICE void tile(const Work& w) {
    const int count = w.keys.count(), i = w.i0 + this->row();
    Softmax softmax;
    softmax.start(a.sink, w.head, UNIT, quad_lane());
    float out[Base::OUT];
    if (count > 0) {
      // Products to probabilities.
      const auto weigh = [&]<bool EDGE>(float (&x)[Base::PRODUCTS], int t, float (&decay)[2]) {
        const int j = w.keys.at(t) * S::BLOCK_N + 2 * quad_lane();
        if constexpr (TERMS) add_terms<false>(x, a.terms, w.head, i, j, w.offset, [](int, float) {});
        if constexpr (EDGE) hide<false>(x, w, i, j);
        softmax.template next<EDGE || TERMS, TERMS>(x, a.terms.scale * LOG2E, decay,
                                                    typename Base::Exponentials{*this});
      };
      // What lies behind a tensor's last row arrives as 0.
      const auto live = [&](int t) {
        return w.row_k + w.len_k < a.lengths.rows_k ? w.len_k - w.keys.at(t) * S::BLOCK_N : S::BLOCK_N;
      };
      const int q = this->q_stage = tiles % S::Q_STAGES;
      ptx::barrier_wait(shared.q_full(q), tiles / S::Q_STAGES & 1);
      this->template sum_values<TERMS>(count, w.keys.edges(), out, weigh, live, [&] { release(shared.q_empty(q)); });
      ++tiles;
    } else {
#pragma unroll
      for (int n = 0; n < Base::OUT; ++n) out[n] = 0;
    }
    float weight[2], lse[2];
    softmax.finish(UNIT, weight, lse);
    store_rows<T>(a.rows(), w.batch, w.row_q, w.head, i, w.len_q, a.head_dim_v, out, weight, quad_lane());
    store_lse(a, w, i, lse, quad_lane());
  }

  DUPLEX_DEVICE void run(Tickets<Work> tickets) {
    this->open();
    tickets.for_each<true>([&](const Work& w) { tile(w); });
  }
};

}  // namespace duplex::sm90
