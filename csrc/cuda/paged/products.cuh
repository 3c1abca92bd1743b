// A tile of packed rows against blocks of its keys by mma.sync: what warps do with keys and values that lie in shared
// memory as numbers or as bytes, whoever brought them there.
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/merge_row.cuh"
#include "cuda/paged/rope.cuh"
#include "cuda/paged/scores.cuh"
#include "cuda/paged/stored.cuh"
#include "cuda/paged/tiles.cuh"
#include "cuda/sm80/fragments.cuh"

namespace duplex::paged {

using sm80::Fragments;

// L says how the tile is divided among warps, and where in shared memory queries (Q), stages of keys and values (KV)
// and the states of softmaxes (STATE) lie.
template <class T, Storage S, class L>
struct Products {
  static constexpr bool QUANTISED = S != Storage::AS_QUERIES;
  static constexpr int HEAD_DIM = L::HEAD_DIM, ROWS = L::ROWS;
  static constexpr int STEPS = HEAD_DIM / 16;  // of products over head_dim, and 16 columns of values each

  const RowTile& tile;
  const Call& c;
  const Piece& piece;
  const uint32_t base;
  const int thread, lane, warp_m, warp_n;

  DUPLEX_DEVICE explicit Products(const RowTile& tile)
      : tile(tile),
        c(tile.c),
        piece(tile.piece),
        base(ptx::shared_base()),
        thread(ptx::thread_index()),
        lane(thread % 32),
        warp_m(thread / 32 % L::WARPS_M),
        warp_n(thread / 32 / L::WARPS_M) {}

  DUPLEX_DEVICE uint32_t key_stage(int n) const { return base + L::KV + n % L::STAGES * 2 * L::Side::BYTES; }
  DUPLEX_DEVICE uint32_t value_stage(int n) const { return key_stage(n) + L::Side::BYTES; }

  using Queries = uint32_t[L::Q_STAYS ? 1 : STEPS][4];  // a lane's, where they do not stay in shared memory

  // The tile's queries, rotated, in the order in which lanes hold them as A of the products: a warp takes a row. Bytes
  // of keys come to lanes four at a time, so their columns are taken in another order, the same for both operands.
  DUPLEX_DEVICE void put_queries() const {
    using Stored = typename T::Stored;
    for (int m = thread / 32; m < ROWS; m += L::WARPS) {
      const RowTile::Row r = tile.row(m);
      const Stored* from = c.q.template at<Stored>(0, r.live ? piece.row + r.i : 0, r.head);
      const int64_t position = tile.position(r);
      for (int pair = lane; pair < HEAD_DIM / 2; pair += 32) {
        float x[2][1] = {{0}, {0}};
        for (int e = 0; e < 2; ++e)
          if (r.live && 2 * pair + e < c.head_dim) load_rotated<T>(from, 2 * pair + e, position, c.rope, x[e]);
        const int step = pair / 8, p = pair % 8, column = QUANTISED ? p / 2 : p % 4, half = QUANTISED ? p % 2 : p / 4;
        const int word = m % 16 / 8 + 2 * half, holder = m % 8 * 4 + column;
        ptx::shared_store(base + L::Q + ((m / 16 * STEPS + step) * 32 + holder) * 16 + 4 * word,
                          int(ptx::pack<T>(x[0][0], x[1][0])));
      }
    }
  }
  DUPLEX_DEVICE Words4 queries(int step) const {
    return ptx::shared_load16(base + L::Q + ((warp_m * STEPS + step) * 32 + lane) * 16);
  }

  DUPLEX_DEVICE void load_queries(Queries& q) const {
    if constexpr (!L::Q_STAYS)
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const Words4 words = queries(s);
#pragma unroll
        for (int n = 0; n < 4; ++n) q[s][n] = words.word[n];
      }
  }

  DUPLEX_DEVICE RowPair row_pair() const {
    RowPair rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowTile::Row of = tile.row(16 * warp_m + lane / 4 + 8 * r);
      rows.i[r] = of.i;
      rows.head[r] = of.head;
    }
    return rows;
  }

  // The warp's products of a block, as accumulators lie: rows lane / 4 + {0, 8}, columns 8 g + 2 (lane % 4) + {0, 1}.
  DUPLEX_DEVICE void multiply_keys(float (&x)[L::KEYS / 2], const Queries& q, int n) const {
#pragma unroll
    for (int n = 0; n < L::KEYS / 2; ++n) x[n] = 0;
    constexpr int AT_ONCE = QUANTISED ? 2 : 1;  // steps that one load of matrices is for
    const auto keys_at = Fragments<typename L::Side>::across(key_stage(n), lane);
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      uint32_t a[AT_ONCE][4];
#pragma unroll
      for (int s = 0; s < AT_ONCE; ++s) {
        if constexpr (L::Q_STAYS) {
          const Words4 words = queries(step + s);
#pragma unroll
          for (int n = 0; n < 4; ++n) a[s][n] = words.word[n];
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) a[s][n] = q[step + s][n];
        }
      }
#pragma unroll
      for (int k = 0; k < L::KEYS / 16; ++k) {
        uint32_t b[4];  // of 8 keys: two units; of the next 8 keys: the same
        ptx::load_matrices(b, keys_at(warp_n * L::KEYS + 16 * k, step / AT_ONCE));
        if constexpr (QUANTISED) {
          uint32_t wide[4][2];
          widen_words<T, S, 1>(b, wide);
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              ptx::mma<T>(x + 8 * k + 4 * half, a[s], wide[2 * half + s][0], wide[2 * half + s][1]);
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
    constexpr int AT_ONCE = QUANTISED ? 2 : 1;
    const auto values_at = Fragments<typename L::Side>::down(value_stage(n), lane);
#pragma unroll
    for (int k = 0; k < L::KEYS / 16; ++k)
#pragma unroll
      for (int u = 0; u < STEPS; u += AT_ONCE) {
        uint32_t b[4];  // of 8 keys and the next 8: a unit; then the next unit
        ptx::load_matrices_transposed(b, values_at(warp_n * L::KEYS + 16 * k, u / AT_ONCE));
        if constexpr (QUANTISED) {
          uint32_t wide[4][2];
          widen_words<T, S, 2>(b, wide);
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd)
              ptx::mma<T>(sum + 8 * (u + s) + 4 * odd, p[k], wide[2 * s][odd], wide[2 * s + 1][odd]);
        } else {
          ptx::mma<T>(sum + 8 * u, p[k], b[0], b[1]);
          ptx::mma<T>(sum + 8 * u + 4, p[k], b[2], b[3]);
        }
      }
  }

  // Which column accumulator n of multiply_values is.
  DUPLEX_DEVICE int column_of_sum(int n) const {
    const int run = n / 4 % 2, number = n % 2, quad = lane % 4;
    return n / 8 * 16 + (QUANTISED ? 4 * quad + 2 * number + run : 8 * run + 2 * quad + number);
  }

  // Products of block t to weights of its values, whose scales are in them; scale_keys(x) and scale_values(x) multiply
  // columns by the scales.
  template <class K, class V>
  DUPLEX_DEVICE void weigh(float (&x)[L::KEYS / 2], uint32_t (&p)[L::KEYS / 16][4], const RowPair& rows, int t,
                           Softmax& softmax, float (&decay)[2], K&& scale_keys, V&& scale_values) const {
    if (QUANTISED && c.pages.k_scales) scale_keys(x);
    const int32_t j = tile.block_at(t) * L::BLOCK_N + warp_n * L::KEYS + 2 * (lane % 4);
    add_terms(x, c.terms, rows, j, int32_t(piece.span.offset));
    if (t < tile.edges()) hide(x, piece.span, rows, j);
    softmax.next<true, true>(x, 0, decay);
    if (QUANTISED && c.pages.v_scales) scale_values(x);
    pack_operand<T>(x, p);
  }

  // One more block, in stage n.
  template <class K, class V>
  DUPLEX_DEVICE void add_block(float (&sum)[HEAD_DIM / 2], const Queries& q, const RowPair& rows, int t, int n,
                               Softmax& softmax, K&& scale_keys, V&& scale_values) const {
    float x[L::KEYS / 2], decay[2];
    uint32_t p[L::KEYS / 16][4];
    multiply_keys(x, q, n);
    weigh(x, p, rows, t, softmax, decay, scale_keys, scale_values);
#pragma unroll
    for (int m = 0; m < HEAD_DIM / 2; ++m) sum[m] *= decay[row_of(m)];
    multiply_values(sum, p, n);
  }

  // Where a warp's sum of row m and a column lies, spread over banks; and its largest score and sum of weights.
  DUPLEX_DEVICE uint32_t sum_at(int warp, int m, int column) const {
    return base + L::KV + ((warp * ROWS + m) * HEAD_DIM + (column ^ (m & 3) << 3)) * 4;
  }
  DUPLEX_DEVICE uint32_t state_at(int warp, int m) const { return base + L::STATE + (warp * ROWS + m) * 8; }

  DUPLEX_DEVICE void put_sums(Softmax& softmax, const float (&sum)[HEAD_DIM / 2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      softmax.total[r] += ptx::shuffle_xor(softmax.total[r], 1);
      softmax.total[r] += ptx::shuffle_xor(softmax.total[r], 2);
      const int m = 16 * warp_m + lane / 4 + 8 * r;
      if (lane % 4 == 0) {
        ptx::shared_store(state_at(warp_n, m), softmax.largest[r]);
        ptx::shared_store(state_at(warp_n, m) + 4, softmax.total[r]);
      }
    }
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 2; ++n)
      ptx::shared_store(sum_at(warp_n, 16 * warp_m + lane / 4 + 8 * row_of(n), column_of_sum(n)), sum[n]);
  }

  // A warp joins what the warps have of row m, each its own keys, and writes it where it belongs.
  DUPLEX_DEVICE void finish(int m) const {
    const RowTile::Row r = tile.row(m);
    if (!r.live) return;
    float largest = -INFINITY, total = 0, weight[L::WARPS_N];
#pragma unroll
    for (int w = 0; w < L::WARPS_N; ++w) largest = fmaxf(largest, ptx::shared_load_float(state_at(w, m)));
    const float reference = largest == -INFINITY ? 0.f : largest;
#pragma unroll
    for (int w = 0; w < L::WARPS_N; ++w) {
      weight[w] = ptx::exp2((ptx::shared_load_float(state_at(w, m)) - reference) * LOG2E);
      total += weight[w] * ptx::shared_load_float(state_at(w, m) + 4);
    }
    const float lse = total != 0 ? reference + ptx::log2(total) * LN2 : -INFINITY;
    const auto number = [&](int, int column) {
      float x = 0;
#pragma unroll
      for (int w = 0; w < L::WARPS_N; ++w) x = ptx::fma(ptx::shared_load_float(sum_at(w, m, column)), weight[w], x);
      return x / total;
    };
    if (piece.slot >= 0) {
      const int64_t slot = piece.slot + r.i - piece.begin;
      float* to = c.parts + (slot * c.heads_q + r.head) * c.head_dim_v;
      for (int column = lane; column < c.head_dim_v; column += 32) to[column] = total != 0 ? number(0, column) : 0.f;
      if (lane == 0) c.parts_lse[int64_t(r.head) * c.slots + slot] = lse;
      return;
    }
    // In the steps of a merge: how many parts its neighbours have changes no bit of a row.
    using Stored = typename T::Stored;
    const int64_t row = piece.row + r.i;
    Stored* to = c.out.template at<Stored>(0, row, r.head);
    const float whole = merge_row(
        1, c.sink ? c.sink[r.head] : -INFINITY, c.head_dim_v, lane, [&](int) { return lse; }, number,
        [&](int column, float x) { to[column] = narrow<T>(x); });
    if (lane == 0) c.lse[int64_t(r.head) * c.batch.rows_q + row] = whole;
  }
};

}  // namespace duplex::paged
