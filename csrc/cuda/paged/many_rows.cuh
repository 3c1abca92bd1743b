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
  static constexpr int COUNT = L::KEYS / 2;
  static_assert(L::WARPS_N == 1);

  struct State {
    Queries q;
    Rows<RowsDown> rows;
    RowUnits units;
    Softmax softmax;
    ValueUnit values;
    float sum[HEAD_DIM / 2] = {};
  };
  DUPLEX_DEVICE int row(int lane, int r) const { return 16 * warp_m + lane / 4 + 8 * r; }
  DUPLEX_DEVICE void start(State& s) const {
    this->load_queries(s.q);
    s.softmax.start(nullptr, 0, 1, lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s.rows.put(r, tile, row(lane, r));
      if constexpr (QUANTISED) s.units.put(r, this->query_unit(row(lane, r)));
    }
  }

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
  DUPLEX_DEVICE uint32_t scale_columns(float (&x)[COUNT], F&& f) const {
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

  // One more block of keys, the t-th of the tile's, in stage n. key_scale(k) and value_scale(k) are what the warp's key
  // k and its value are worth.
  template <class K, class V>
  DUPLEX_DEVICE void add_block(State& s, int t, int block, int n, K&& key_scale, V&& value_scale) const {
    float x[COUNT], decay[2];
    uint32_t p[L::KEYS / 16][4];
    multiply_keys(x, s.q, n);
    if constexpr (QUANTISED) {
      if (c.pages.k_scales) scale_columns(x, key_scale);
#pragma unroll
      for (int n = 0; n < COUNT; ++n) x[n] *= s.units.of(row_of(n));
    }
    const int32_t j = block * L::BLOCK_N + 2 * (lane % 4);
    add_terms(x, tile, s.rows, j);
    if (t < tile.edges()) hide(x, tile, s.rows, j);
    s.softmax.template next<true, true>(x, 0, decay);
    if (QUANTISED && c.pages.v_scales) {
      const float grow = s.values.grow(scale_columns(x, value_scale)), shrunk = inverse(s.values.unit);
#pragma unroll
      for (int n = 0; n < COUNT; ++n) x[n] *= shrunk;
      decay[0] *= grow;
      decay[1] *= grow;
    }
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
