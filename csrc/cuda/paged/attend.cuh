// Attention over pages: a block takes a tile of rows, the heads that share a kv head, and a part of the keys that they
// see. The query heads of a kv head lie side by side in a tile, so that a key is read once for all of them and decoding
// fills the tensor cores' 16 rows. (Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023.)
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

// 64 rows: four warps have 16 each, and all keys. 16 rows: all warps have these, and 16 keys of a block each.
template <Storage S, int HEAD_DIM_, int ROWS_>
struct Tile {
  static constexpr int HEAD_DIM = HEAD_DIM_, ROWS = ROWS_;
  static constexpr int BLOCK_N = HEAD_DIM == 256 && (ROWS == LARGE_ROWS || S == Storage::AS_QUERIES) ? 32 : 64;
  static constexpr int WARPS_M = ROWS / 16, WARPS_N = ROWS == LARGE_ROWS ? 1 : BLOCK_N / 16;
  static constexpr int WARPS = WARPS_M * WARPS_N, THREADS = 32 * WARPS;
  static constexpr int KEYS = BLOCK_N / WARPS_N;  // of a warp
  using Side =
      duplex::Tile<BLOCK_N, HEAD_DIM * STORED_BYTES<S> / 2>;  // keys or values, two bytes a number as if they were one
  static constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
  // Queries stay in registers, which the widest have none left for. They come by way of the last stage, then empty.
  static constexpr bool Q_STAYS = HEAD_DIM == 256;
  static constexpr int LIMIT = 96 * 1024 - (Q_STAYS ? Q_BYTES : 0), FITTING = LIMIT / (2 * Side::BYTES);
  static constexpr int STAGES = FITTING < 4 ? FITTING : 4;

  static constexpr int KV = 0;
  static constexpr int Q = KV + (Q_STAYS ? STAGES : STAGES - 1) * 2 * Side::BYTES;
  static constexpr int PLACES = KV + STAGES * 2 * Side::BYTES + (Q_STAYS ? Q_BYTES : 0);
  static constexpr int SCALES = PLACES + STAGES * BLOCK_N * 16;
  static constexpr int SHARED_BYTES = SCALES + (S == Storage::AS_QUERIES ? 0 : STAGES * BLOCK_N * 8);
  static_assert(STAGES >= 2 && SHARED_BYTES <= 99 * 1024 && THREADS >= BLOCK_N &&
                (Q_STAYS || Q_BYTES <= 2 * Side::BYTES));
  // In the end the sums of all warps lie where keys did, and what they are relative to where their places were.
  static_assert(WARPS_N * ROWS * HEAD_DIM * 4 <= STAGES * 2 * Side::BYTES &&
                WARPS_N * ROWS * 8 <= STAGES * BLOCK_N * 16);
};

template <class T, Storage S, int HEAD_DIM, int ROWS>
struct Attend {
  using L = Tile<S, HEAD_DIM, ROWS>;
  static constexpr bool QUANTISED = S != Storage::AS_QUERIES;
  static constexpr int STEPS = HEAD_DIM / 16;  // of products over head_dim, and 16 columns of values each

  const RowTile& tile;
  const Call& c;
  const Piece& piece;
  const uint32_t base;
  const int thread, lane, warp_m, warp_n;

  DUPLEX_DEVICE explicit Attend(const RowTile& tile)
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
  DUPLEX_DEVICE uint32_t places(int n) const { return base + L::PLACES + n % L::STAGES * L::BLOCK_N * 16; }
  DUPLEX_DEVICE uint32_t scales(int n) const { return base + L::SCALES + n % L::STAGES * L::BLOCK_N * 8; }

  // Where this thread's key of a block lies; no page where it is none.
  struct Where {
    int32_t page, slot;
  };
  DUPLEX_DEVICE Where where_of(int t) const {
    if (thread >= L::BLOCK_N || t >= tile.keys.count()) return {-1, 0};
    const int32_t j = tile.block_at(t) * L::BLOCK_N + thread;
    if (j >= piece.span.len_k) return {-1, 0};
    const uint32_t key = uint32_t(piece.first + j), size = uint32_t(c.pages.page_size), page = key / size;
    return {clamp32(c.pages.table[piece.sequence * c.pages.table_row + page], 0, c.num_pages - 1),
            int32_t(key - page * size)};
  }

  // For all threads: how many bytes its rows of keys and values lie from those of page 0, or -1.
  DUPLEX_DEVICE void put_place(int t, Where at) const {
    if (thread >= L::BLOCK_N) return;
    const auto bytes_to = [&](const View& v) {
      return uint64_t(at.page < 0 ? -1 : (at.page * v.batch + at.slot * v.row) * STORED_BYTES<S>);
    };
    const uint64_t k = bytes_to(c.pages.k), v = bytes_to(c.pages.v);
    ptx::shared_store16(places(t) + 16 * thread, {uint32_t(k), uint32_t(k >> 32), uint32_t(v), uint32_t(v >> 32)});
  }

  // Block t of keys and values into its stage; what is no key is 0.
  DUPLEX_DEVICE void copy_block(int t, Where own) const {
    constexpr int UNITS = L::Side::ROW_BYTES / 16, ALL_UNITS = L::Side::PANELS * UNITS;  // of 16 bytes in a row
    if (t < tile.keys.count()) {
      const char* k = static_cast<const char*>(c.pages.k.data) + tile.share.kv_head * c.pages.k.head * STORED_BYTES<S>;
      const char* v = static_cast<const char*>(c.pages.v.data) + tile.share.kv_head * c.pages.v.head * STORED_BYTES<S>;
#pragma unroll 2
      for (int n = thread; n < L::BLOCK_N * ALL_UNITS; n += L::THREADS) {
        const int row = n / ALL_UNITS, unit = n % ALL_UNITS;
        const Words4 place = ptx::shared_load16(places(t) + 16 * row);
        const uint32_t to = unit / UNITS * L::Side::PANEL_BYTES + swizzled(row, unit % UNITS, L::Side::ROW_BYTES);
        copy_unit(key_stage(t) + to, k, place.word[0], place.word[1], c.head_dim, unit);
        copy_unit(value_stage(t) + to, v, place.word[2], place.word[3], c.head_dim_v, unit);
      }
      if (QUANTISED && thread < L::BLOCK_N) {
        copy_scale(scales(t), c.pages.k_scales, own);
        copy_scale(scales(t) + 4 * L::BLOCK_N, c.pages.v_scales, own);
      }
    }
    ptx::copy_commit();
  }
  DUPLEX_DEVICE static void copy_unit(uint32_t to, const char* from, uint32_t low, uint32_t high, int dim, int unit) {
    const int64_t place = int64_t(low | uint64_t(high) << 32);
    const int bytes = clamp32(dim * STORED_BYTES<S> - 16 * unit, 0, place < 0 ? 0 : 16);
    ptx::copy_async<16>(to, bytes > 0 ? from + place + 16 * unit : from, bytes);
  }
  DUPLEX_DEVICE void copy_scale(uint32_t to, const ScaleView& s, Where own) const {
    if (!s) return;
    const int64_t offset = own.page < 0 ? 0 : own.page * s.page + own.slot * s.slot + tile.share.kv_head * s.head;
    ptx::copy_async<4>(to + 4 * thread, s.data + offset, own.page < 0 ? 0 : 4);
  }

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

  // The warp's products of a block, as accumulators lie: rows lane / 4 + {0, 8}, columns 8 g + 2 (lane % 4) + {0, 1}.
  DUPLEX_DEVICE void multiply_keys(float (&x)[L::KEYS / 2], const uint32_t (&q)[L::Q_STAYS ? 1 : STEPS][4],
                                   int t) const {
#pragma unroll
    for (int n = 0; n < L::KEYS / 2; ++n) x[n] = 0;
    constexpr int AT_ONCE = QUANTISED ? 2 : 1;  // steps that one load of matrices is for
    const auto keys_at = Fragments<typename L::Side>::across(key_stage(t), lane);
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
  DUPLEX_DEVICE void multiply_values(float (&sum)[HEAD_DIM / 2], const uint32_t (&p)[L::KEYS / 16][4], int t) const {
    constexpr int AT_ONCE = QUANTISED ? 2 : 1;
    const auto values_at = Fragments<typename L::Side>::down(value_stage(t), lane);
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

  DUPLEX_DEVICE void scale_columns(float (&x)[L::KEYS / 2], uint32_t scales_of_block) const {
#pragma unroll
    for (int n = 0; n < L::KEYS / 2; ++n)
      x[n] *= ptx::shared_load_float(scales_of_block + 4 * (warp_n * L::KEYS + column_of(n) + 2 * (lane % 4)));
  }

  DUPLEX_DEVICE void weigh(float (&x)[L::KEYS / 2], uint32_t (&p)[L::KEYS / 16][4], const RowPair& rows, int t,
                           Softmax& softmax, float (&decay)[2]) const {
    if (QUANTISED && c.pages.k_scales) scale_columns(x, scales(t));
    const int32_t j = tile.block_at(t) * L::BLOCK_N + warp_n * L::KEYS + 2 * (lane % 4);
    add_terms(x, c.terms, rows, j, int32_t(piece.span.offset));
    if (t < tile.edges()) hide(x, piece.span, rows, j);
    softmax.next<true, true>(x, 0, decay);
    if (QUANTISED && c.pages.v_scales) scale_columns(x, scales(t) + 4 * L::BLOCK_N);
    pack_operand<T>(x, p);
  }

  DUPLEX_DEVICE void run() {
    const int count = tile.keys.count();
    Where own[L::STAGES];
#pragma unroll
    for (int t = 0; t < L::STAGES; ++t) {
      own[t] = where_of(t);
      put_place(t, own[t]);
    }
    ptx::block_sync();
#pragma unroll
    for (int t = 0; t < L::STAGES - 1; ++t) copy_block(t, own[t]);
    Where placed = own[L::STAGES - 1], next = where_of(L::STAGES);
    put_queries();
    ptx::block_sync();
    uint32_t q[L::Q_STAYS ? 1 : STEPS][4];
    if constexpr (!L::Q_STAYS)
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const Words4 words = queries(s);
#pragma unroll
        for (int n = 0; n < 4; ++n) q[s][n] = words.word[n];
      }

    RowPair rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowTile::Row of = tile.row(16 * warp_m + lane / 4 + 8 * r);
      rows.i[r] = of.i;
      rows.head[r] = of.head;
    }
    Softmax softmax;
    softmax.start(nullptr, 0, 1, lane % 4);
    float sum[HEAD_DIM / 2];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 2; ++n) sum[n] = 0;
    for (int t = 0; t < count; ++t) {
      ptx::copy_wait<L::STAGES - 2>();
      ptx::block_sync();
      copy_block(t + L::STAGES - 1, placed);
      put_place(t + L::STAGES, next);
      placed = next;
      next = where_of(t + L::STAGES + 1);
      float x[L::KEYS / 2], decay[2];
      uint32_t p[L::KEYS / 16][4];
      multiply_keys(x, q, t);
      weigh(x, p, rows, t, softmax, decay);
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 2; ++n) sum[n] *= decay[row_of(n)];
      multiply_values(sum, p, t);
    }
    ptx::copy_wait<0>();
    ptx::block_sync();
    put_sums(softmax, sum);
    ptx::block_sync();
    for (int m = thread / 32; m < ROWS; m += L::WARPS) finish(m);
    ptx::block_sync();
  }

  // Where a warp's sum of row m and a column lies, spread over banks; and its largest score and sum of weights.
  DUPLEX_DEVICE uint32_t sum_at(int warp, int m, int column) const {
    return base + L::KV + ((warp * ROWS + m) * HEAD_DIM + (column ^ (m & 3) << 3)) * 4;
  }
  DUPLEX_DEVICE uint32_t state_at(int warp, int m) const { return base + L::PLACES + (warp * ROWS + m) * 8; }

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

template <class T, Storage S, int HEAD_DIM, int ROWS>
DUPLEX_KERNEL((Tile<S, HEAD_DIM, ROWS>::THREADS))
attend_kernel(DUPLEX_PARAMETER Call c, Which which, int32_t units) {
  const Share share(c, ROWS, ptx::block_index());
  if (which != Which::SHARED && ptx::thread_index() < 32) clear_outside<T>(c, share, units);
  for_each_tile(c, share, which, Tile<S, HEAD_DIM, ROWS>::BLOCK_N,
                [](const RowTile& tile) { Attend<T, S, HEAD_DIM, ROWS>(tile).run(); });
}

}  // namespace duplex::paged
