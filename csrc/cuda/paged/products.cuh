// A tile of packed rows against blocks of its keys by mma.sync, whoever brought these to shared memory, as numbers or
// as bytes: what tiles of few rows and of many have in common, queries on their way in and sums on their way out.
#pragma once

#include <type_traits>

#include "cuda/merge_row.cuh"
#include "cuda/paged/rope.cuh"
#include "cuda/paged/scores.cuh"
#include "cuda/paged/stored.cuh"
#include "cuda/paged/tiles.cuh"
#include "cuda/sm80/fragments.cuh"

namespace duplex::paged {

// L says how the tile is divided among warps, and where in shared memory queries (Q) and their units (UNITS), stages of
// keys and values (KV) and the states of softmaxes (STATE) lie.
template <class T, Storage S, class L>
struct Products {
  static constexpr bool QUANTISED = S != Storage::AS_QUERIES;
  static constexpr int HEAD_DIM = L::HEAD_DIM, ROWS = L::ROWS, BLOCK_N = L::BLOCK_N;
  static constexpr int STEPS = HEAD_DIM / 16;                // of products over head_dim, and 16 columns of values each
  static constexpr int AT_ONCE = QUANTISED ? 2 : 1;          // steps that one load of matrices is for
  using Factor = std::conditional_t<QUANTISED, Float16, T>;  // type of what is multiplied

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

  // The tile's queries, rotated, in the order in which lanes hold them as operands of the products: a few lanes take a
  // row, eight columns each. Bytes of keys come to lanes four at a time, so their columns are taken in another order,
  // the same for both operands; and rows are divided by the unit of their largest number. Only the first `rows` are
  // multiplied.
  DUPLEX_DEVICE void put_queries(int rows = ROWS) const {
    constexpr int LANES = HEAD_DIM / 8;
    const int unit = thread % LANES;
    for (int m = thread / LANES; m < rows; m += L::WARPS * 32 / LANES) {
      float x[8] = {};
      if (const RowTile::Row r = tile.row(m); r.live)
        load_eight<T>(c.q.template at<typename T::Stored>(0, piece.row + r.i, r.head), 8 * unit, c.head_dim,
                      c.q_vectors, tile.position(r), c.rope, x);
      if constexpr (QUANTISED) divide_by_unit<LANES>(x, m);
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // pairs of columns
        const int column = QUANTISED ? 2 * (unit % 2) + n / 2 : n, half = QUANTISED ? n % 2 : unit % 2;
        const int word = m % 16 / 8 + 2 * half, holder = m % 8 * 4 + column;
        ptx::shared_store(base + L::Q + ((m / 16 * STEPS + unit / 2) * 32 + holder) * 16 + 4 * word,
                          int(ptx::pack<Factor>(x[2 * n], x[2 * n + 1])));
      }
    }
  }
  template <int LANES>
  DUPLEX_DEVICE void divide_by_unit(float (&x)[8], int m) const {
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const uint32_t size = size_bits(x[n]);
      largest = size > largest ? size : largest;
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
      const uint32_t other = ptx::shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    const uint32_t unit = unit_of(largest);
    if (thread % LANES == 0) ptx::shared_store(base + L::UNITS + 4 * m, ptx::float_of(unit));
#pragma unroll
    for (int n = 0; n < 8; ++n) x[n] *= inverse(unit);
  }

  // What products of bytes with row m are to be multiplied by.
  DUPLEX_DEVICE float query_unit(int m) const { return ptx::shared_load_float(base + L::UNITS + 4 * m); }

  DUPLEX_DEVICE Words4 queries(int step) const {
    return ptx::shared_load16(base + L::Q + ((warp_m * STEPS + step) * 32 + lane) * 16);
  }

  // Of one step, from where they are.
  DUPLEX_DEVICE void take_queries(const Queries& q, int step, uint32_t (&x)[4]) const {
    if constexpr (L::Q_STAYS) {
      const Words4 words = queries(step);
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = words.word[n];
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) x[n] = q[step][n];
    }
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

  // Where a warp's sum of row m and a column lies, spread over banks; and its largest score and sum of weights.
  DUPLEX_DEVICE uint32_t sum_at(int warp, int m, int column) const {
    return base + L::KV + ((warp * ROWS + m) * HEAD_DIM + (column ^ (m >> 1 & 3) << 3)) * 4;
  }
  DUPLEX_DEVICE uint32_t state_at(int warp, int m) const { return base + L::STATE + (warp * ROWS + m) * 8; }

  DUPLEX_DEVICE void put_state(int warp, int m, float largest, float total) const {
    ptx::shared_store(state_at(warp, m), largest);
    ptx::shared_store(state_at(warp, m) + 4, total);
  }
  // What sums are to be multiplied by.
  DUPLEX_DEVICE float value_unit(const ValueUnit& values) const {
    return QUANTISED && c.pages.v_scales ? ptx::float_of(values.unit) : 1;
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
    const float inverse = ptx::divide(1, total);
    const auto number = [&](int column) {
      float x = 0;
#pragma unroll
      for (int w = 0; w < L::WARPS_N; ++w) x = ptx::fma(ptx::shared_load_float(sum_at(w, m, column)), weight[w], x);
      return x * inverse;
    };
    if (piece.slot >= 0) {
      const int64_t slot = piece.slot + r.i - piece.begin;
      float* to = c.parts + (slot * c.heads_q + r.head) * c.head_dim_v;
      for (int column = lane; column < c.head_dim_v; column += 32) to[column] = total != 0 ? number(column) : 0.f;
      if (lane == 0) c.parts_lse[int64_t(r.head) * c.slots + slot] = lse;
      return;
    }
    // In the steps of a merge: how many parts its neighbours have changes no bit of a row.
    using Stored = typename T::Stored;
    const int64_t row = piece.row + r.i;
    Stored* to = c.out.template at<Stored>(0, row, r.head);
    const float whole = merge_one(lse, c.sink ? c.sink[r.head] : -INFINITY, c.head_dim_v, lane, number,
                                  [&](int column, float x) { to[column] = narrow<T>(x); });
    if (lane == 0) c.lse[int64_t(r.head) * c.batch.rows_q + row] = whole;
  }
};

// What follows is alike for both ways W that products lie: W::State is what a lane keeps from block to block.

template <class W>
DUPLEX_DEVICE void start(const W& w, typename W::State& s) {
  w.load_queries(s.q);
#pragma unroll
  for (int r = 0; r < W::Layout::ROWS; ++r) {
    const int m = w.row(w.lane, r);
    s.rows.put(r, w.tile, m);
    if constexpr (W::QUANTISED) s.units.put(r, w.query_unit(m));
  }
}

// One more block of keys, in stage n. key_scale(k) and value_scale(k) are what the warp's key k and its value are
// worth.
template <class W, class K, class V>
DUPLEX_DEVICE void add_block(const W& w, typename W::State& s, int block, int n, K&& key_scale, V&& value_scale) {
  using Layout = typename W::Layout;
  float x[W::COUNT], decay[Layout::ROWS];
  w.multiply_keys(x, s.q, n);
  if constexpr (W::QUANTISED) {
    if (w.c.pages.k_scales) w.scale_keys(x, key_scale);
#pragma unroll
    for (int n = 0; n < W::COUNT; ++n) x[n] *= s.units.of(Layout::row(n));
  }
  const int32_t j = block * W::BLOCK_N + w.first_key();
  add_terms(x, w.tile, s.rows, j);
  if (w.tile.keys.is_edge(block)) hide(x, w.tile, s.rows, j);
  w.weigh(s, x, decay);
  if (W::QUANTISED && w.c.pages.v_scales) {
    const float grow = s.values.grow(w.scale_keys(x, value_scale)), shrunk = inverse(s.values.unit);
#pragma unroll
    for (int n = 0; n < W::COUNT; ++n) x[n] *= shrunk;
#pragma unroll
    for (int r = 0; r < Layout::ROWS; ++r) decay[r] *= grow;
  }
  w.add_values(s, x, decay, n);
}

}  // namespace duplex::paged
