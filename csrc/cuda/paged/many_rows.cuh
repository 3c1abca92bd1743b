// Tiles of many rows: a warp has 16 of them, down the products, and all keys of a block.
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/paged/products.cuh"

namespace duplex::paged {

template <class T, Storage S, class L>
struct ManyRows : Products<T, S, L> {
  using Base = Products<T, S, L>;
  using Base::Base;
  using Base::QUANTISED, Base::HEAD_DIM, Base::STEPS, Base::AT_ONCE, Base::tile, Base::c, Base::piece, Base::lane,
      Base::warp_m;
  using typename Base::Factor, typename Base::Queries;
  using Layout = RowsDown;
  static constexpr int COUNT = L::KEYS / 2;  // of a lane's numbers of a block
  static_assert(L::WARPS_N == 1);

  struct State {
    Queries q;
    Rows<Layout> rows;
    RowUnits units;
    Softmax softmax{{-INFINITY, -INFINITY}, {0, 0}};
    ValueUnit values;
    float sum[HEAD_DIM / 2] = {};
  };
  DUPLEX_DEVICE int first_key() const { return 2 * (lane % 4); }  // of the lane's in a block
  DUPLEX_DEVICE int row(int lane, int r) const { return 16 * warp_m + lane / 4 + 8 * r; }
  // Accumulators: rows lane / 4 + {0, 8}, columns 8 g + 2 (lane % 4) + {0, 1}.
  DUPLEX_DEVICE void multiply_keys(float (&x)[COUNT], const Queries& q, int n) const {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] = 0;
    const auto keys_at = sm80::Fragments<typename L::Side>::across(this->key_stage(n), lane);
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      uint32_t a[AT_ONCE][4];
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s) this->take_queries(q, step + s, a[s]);
#pragma unroll
      for (int k = 0; k < L::KEYS / 16; ++k) {
        uint32_t b[4];  // of 8 keys: two units; of the next 8 keys: the same
        ptx::load_matrices(b, keys_at(16 * k, step / AT_ONCE));
        if constexpr (QUANTISED) {
          uint32_t wide[4][2];
          widen_words<S, L::CONVERTS, 1>(b, wide);
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              ptx::mma<Factor>(x + 8 * k + 4 * half, a[s], wide[2 * half + s][0], wide[2 * half + s][1]);
        } else {
          ptx::mma<T>(x + 8 * k, a[0], b[0], b[1]);
          ptx::mma<T>(x + 8 * k + 4, a[0], b[2], b[3]);
        }
      }
    }
  }

  // Adds weights times values. Of 16 columns, a lane's accumulators are in two runs of four: columns 2 (lane % 4) + {0,
  // 1} of 8 each; where values are bytes, even and odd columns of all 16.
  DUPLEX_DEVICE void multiply_values(float (&sum)[HEAD_DIM / 2], const uint32_t (&p)[L::KEYS / 16][4], int n) const {
    const auto values_at = sm80::Fragments<typename L::Side>::down(this->value_stage(n), lane);
#pragma unroll
    for (int k = 0; k < L::KEYS / 16; ++k)
#pragma unroll
      for (int u = 0; u < STEPS; u += AT_ONCE) {
        uint32_t b[4];  // of 8 keys and the next 8: a unit; then the next unit
        ptx::load_matrices_transposed(b, values_at(16 * k, u / AT_ONCE));
        if constexpr (QUANTISED) {
          uint32_t wide[4][2];
          widen_words<S, L::CONVERTS, 2>(b, wide);
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
              ptx::mma<Factor>(sum + 8 * (u + s) + 4 * odd, p[k], wide[2 * s][odd], wide[2 * s + 1][odd]);
        } else {
          ptx::mma<T>(sum + 8 * u, p[k], b[0], b[1]);
          ptx::mma<T>(sum + 8 * u + 4, p[k], b[2], b[3]);
        }
      }
  }

  // Which column accumulator n of multiply_values is.
  DUPLEX_DEVICE static int column_of_sum(int lane, int n) {
    const int run = n / 4 % 2, number = n % 2, quad = lane % 4;
    return n / 8 * 16 + (QUANTISED ? 4 * quad + 2 * number + run : 8 * run + 2 * quad + number);
  }

  // x[n] times f(key) of its column; and the largest of these, as its bits.
  template <class F>
  DUPLEX_DEVICE uint32_t scale_keys(float (&x)[COUNT], F&& f) const {
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
      if (row_of(n) == 0) {
        const float of_key = f(column_of(n) + 2 * (lane % 4));
        x[n] *= of_key;
        x[n + 2] *= of_key;
        if (const uint32_t size = size_bits(of_key); size > largest) largest = size;
      }
    return largest;
  }

  DUPLEX_DEVICE static void weigh(State& s, float (&x)[COUNT], float (&decay)[2]) {
    s.softmax.template next<true, true>(x, 0, decay);
  }

  DUPLEX_DEVICE void add_values(State& s, const float (&x)[COUNT], const float (&decay)[2], int n) const {
    uint32_t p[L::KEYS / 16][4];
    pack_operand<Factor>(x, p);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 2; ++m) s.sum[m] *= decay[row_of(m)];
    multiply_values(s.sum, p, n);
  }

  DUPLEX_DEVICE void put_sums(State& s) const {
    const int lane = ptx::anew(this->lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float& total = s.softmax.total[r];
      total += ptx::shuffle_xor(total, 1);
      total += ptx::shuffle_xor(total, 2);
      if (lane % 4 == 0) this->put_state(0, row(lane, r), s.softmax.largest[r], total);
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 2; ++n)
      ptx::shared_store(this->sum_at(0, row(lane, row_of(n)), column_of_sum(lane, n)),
                        s.sum[n] * this->value_unit(s.values));
  }
};

}  // namespace duplex::paged
