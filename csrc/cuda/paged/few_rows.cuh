// Tiles of few rows, for decoding: every warp has all of them and 16 keys of a block, keys down. So 8 rows are one
// product where 16 rows would be two, and in the products with values, columns are down and rows across again.
#pragma once

#include "cuda/paged/products.cuh"

namespace duplex::paged {

// Softmaxes of the columns of a warp's products, which lanes of equal lane % 4 share.
template <class Layout>
struct ColumnSoftmax {
  float largest[Layout::ROWS], total[Layout::ROWS];  // total: of this lane's keys alone

  DUPLEX_DEVICE ColumnSoftmax() {
#pragma unroll
    for (int r = 0; r < Layout::ROWS; ++r) {
      largest[r] = -INFINITY;
      total[r] = 0;
    }
  }

  // As Softmax::next.
  template <int COUNT>
  DUPLEX_DEVICE void next(float (&x)[COUNT], float (&decay)[Layout::ROWS]) {
    float reference[Layout::ROWS];
#pragma unroll
    for (int r = 0; r < Layout::ROWS; ++r) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
        if (Layout::row(n) == r) most = fmaxf(most, x[n]);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) most = fmaxf(most, ptx::shuffle_xor(most, mask));
      const float now = fmaxf(largest[r], most);
      reference[r] = now == -INFINITY ? 0.f : now;
      decay[r] = ptx::exp2((largest[r] - reference[r]) * LOG2E);
      largest[r] = now;
      total[r] *= decay[r];
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int r = Layout::row(n);
      x[n] = ptx::exp2((x[n] - reference[r]) * LOG2E);
      total[r] += x[n];
    }
  }
};

// TILES: of 8 rows, one or two.
template <class T, Storage S, class L, int TILES>
struct FewRows : Products<T, S, L> {
  using Base = Products<T, S, L>;
  using Base::Base;
  using Base::QUANTISED, Base::HEAD_DIM, Base::STEPS, Base::AT_ONCE, Base::tile, Base::c, Base::piece, Base::lane,
      Base::warp_n;
  using typename Base::Factor, typename Base::Queries;
  using Layout = KeysDown<TILES>;
  static constexpr int ROWS = Layout::ROWS, COUNT = 4 * TILES;  // of a lane: rows, and numbers of a block
  static_assert(L::KEYS == 16);

  struct State {
    Queries q;
    Rows<Layout> rows;
    RowUnits units;
    ColumnSoftmax<Layout> softmax;
    ValueUnit values;
    float sum[STEPS][COUNT] = {};
  };
  DUPLEX_DEVICE int first_key() const { return 16 * warp_n + lane / 4; }  // of the lane's in a block
  DUPLEX_DEVICE static int row(int lane, int r) { return r / 2 * 8 + 2 * (lane % 4) + r % 2; }
  // Where bytes leave few registers, what follows from it is worked out where it is used.
  DUPLEX_DEVICE int lane_anew() const { return QUANTISED ? ptx::anew(lane) : lane; }
  // Accumulators: keys lane / 4 + {0, 8}, rows 2 (lane % 4) + {0, 1} of each 8. Two products are always under way.
  DUPLEX_DEVICE void multiply_keys(float (&x)[COUNT], const Queries& q, int n) const {
    constexpr int CHAINS = 2 / TILES;
    float sum[CHAINS][COUNT] = {};
    const auto keys_at = sm80::Fragments<typename L::Side>::across(this->key_stage(n), lane_anew());
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      uint32_t a[4];  // of 8 keys: two units; of the next 8 keys: the same
      ptx::load_matrices(a, keys_at(16 * warp_n, step / AT_ONCE));
      if constexpr (QUANTISED) {
        uint32_t wide[4][2];
        widen_words<S, L::CONVERTS, 1>(a, wide);
        multiply(sum[0], {wide[0][0], wide[2][0], wide[0][1], wide[2][1]}, q, step);
        multiply(sum[CHAINS - 1], {wide[1][0], wide[3][0], wide[1][1], wide[3][1]}, q, step + 1);
      } else {
        multiply(sum[step % CHAINS], {a[0], a[2], a[1], a[3]}, q, step);
      }
    }
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] = TILES == 1 ? sum[0][n] + sum[CHAINS - 1][n] : sum[0][n];
  }
  DUPLEX_DEVICE void multiply(float (&x)[COUNT], const uint32_t (&keys)[4], const Queries& q, int step) const {
    uint32_t b[4];  // of rows: the first 8, the next 8; in the second half of the step: the same
    this->take_queries(q, step, b);
#pragma unroll
    for (int m = 0; m < TILES; ++m) ptx::mma<Factor>(x + 4 * m, keys, b[m], b[m + 2]);
  }

  // Adds values times weights. Accumulators of 16 columns: lane / 4 + {0, 8}, or 2 (lane / 4) + {0, 1} where values are
  // bytes; rows as above.
  DUPLEX_DEVICE void multiply_values(float (&sum)[STEPS][COUNT], const uint32_t (&p)[TILES][2], int n) const {
    const auto values_at = sm80::Fragments<typename L::Side>::down(this->value_stage(n), lane_anew());
#pragma unroll
    for (int u = 0; u < STEPS; u += AT_ONCE) {
      uint32_t a[4];  // of 8 keys and the next 8: a unit; then the next unit
      ptx::load_matrices_transposed(a, values_at(16 * warp_n, u / AT_ONCE));
      uint32_t wide[4][2];
      if constexpr (QUANTISED) widen_words<S, L::CONVERTS, 2>(a, wide);
#pragma unroll
      for (int m = 0; m < TILES; ++m)
        if constexpr (QUANTISED) {
          ptx::mma<Factor>(sum[u] + 4 * m, {wide[0][0], wide[0][1], wide[1][0], wide[1][1]}, p[m][0], p[m][1]);
          ptx::mma<Factor>(sum[u + 1] + 4 * m, {wide[2][0], wide[2][1], wide[3][0], wide[3][1]}, p[m][0], p[m][1]);
        } else {
          ptx::mma<Factor>(sum[u] + 4 * m, {a[0], a[2], a[1], a[3]}, p[m][0], p[m][1]);
        }
    }
  }
  DUPLEX_DEVICE static int column_of_sum(int lane, int n) {
    return QUANTISED ? 2 * (lane / 4) + n / 2 % 2 : lane / 4 + n / 2 % 2 * 8;
  }

  // x[n] times f(key) of its key; and the larger of these, as its bits.
  template <class F>
  DUPLEX_DEVICE uint32_t scale_keys(float (&x)[COUNT], F&& f) const {
    const float of_key[2] = {f(lane / 4), f(lane / 4 + 8)};
#pragma unroll
    for (int n = 0; n < COUNT; ++n) x[n] *= of_key[n / 2 % 2];
    const uint32_t size[2] = {size_bits(of_key[0]), size_bits(of_key[1])};
    return size[0] > size[1] ? size[0] : size[1];
  }

  DUPLEX_DEVICE static void weigh(State& s, float (&x)[COUNT], float (&decay)[ROWS]) { s.softmax.next(x, decay); }

  DUPLEX_DEVICE void add_values(State& s, const float (&x)[COUNT], const float (&decay)[ROWS], int n) const {
    uint32_t p[TILES][2];
#pragma unroll
    for (int n = 0; n < 2 * TILES; ++n)
      p[n / 2][n % 2] = ptx::transpose_matrix(ptx::pack<Factor>(x[2 * n], x[2 * n + 1]));
    shrink(s.sum, decay);
    multiply_values(s.sum, p, n);
  }

  // Sums hardly ever shrink once the largest scores have been seen.
  DUPLEX_DEVICE void shrink(float (&sum)[STEPS][COUNT], const float (&decay)[ROWS]) const {
    bool shrinks = false;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) shrinks |= decay[r] != 1;
    if (!ptx::any(shrinks)) return;
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int n = 0; n < COUNT; ++n) sum[u][n] *= decay[Layout::row(n)];
  }

  DUPLEX_DEVICE void put_sums(State& s) const {
    const int lane = ptx::anew(this->lane);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float total = s.softmax.total[r];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) total += ptx::shuffle_xor(total, mask);
      if (lane / 4 == 0) this->put_state(warp_n, row(lane, r), s.softmax.largest[r], total);
    }
    // Where sums lie (sum_at) differs between a lane's rows, and between 32 columns, by constants.
    uint32_t to[2][2];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      to[n / 2][n % 2] = this->sum_at(warp_n, row(lane, 0), n / 2 * 16 + column_of_sum(lane, 2 * (n % 2)));
    const float unit = this->value_unit(s.values);
#pragma unroll
    for (int u = 0; u < STEPS; ++u)
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
        ptx::shared_store(to[u % 2][n / 2 % 2] + 4 * (u / 2 * 32 + row(0, Layout::row(n)) * HEAD_DIM),
                          s.sum[u][n] * unit);
  }
};

}  // namespace duplex::paged
