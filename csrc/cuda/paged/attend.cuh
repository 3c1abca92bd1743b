// Attention over pages: a block takes a tile of rows, the heads that share a kv head, and a part of the keys that they
// see. The query heads of a kv head lie side by side in a tile, so that a key is read once for all of them and decoding
// fills the tensor cores' 16 rows. (Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023.)
#pragma once

#include "cuda/paged/few_rows.cuh"
#include "cuda/paged/many_rows.cuh"

namespace duplex::paged {

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
  static constexpr bool CONVERTS = false;                     // float8 in hardware
  static constexpr int Q_BYTES = ROWS * HEAD_DIM * 2;
  // Queries stay in registers, which the widest have none left for. They come by way of the last stage, then empty.
  static constexpr bool Q_STAYS = HEAD_DIM == 256;
  static constexpr int LIMIT = 96 * 1024 - (Q_STAYS ? Q_BYTES : 0), FITTING = LIMIT / (2 * Side::BYTES);
  static constexpr int STAGES = FITTING < 4 ? FITTING : 4;

  static constexpr int KV = 0;
  static constexpr int Q = KV + (Q_STAYS ? STAGES : STAGES - 1) * 2 * Side::BYTES;
  static constexpr int PLACES = KV + STAGES * 2 * Side::BYTES + (Q_STAYS ? Q_BYTES : 0), STATE = PLACES;
  static constexpr int SCALES = PLACES + STAGES * BLOCK_N * 16;
  static constexpr int UNITS = SCALES + (STAGES - 1) * BLOCK_N * 8;  // by way of the last stage too
  static constexpr int SHARED_BYTES = SCALES + (S == Storage::AS_QUERIES ? 0 : STAGES * BLOCK_N * 8);
  static_assert(STAGES >= 2 && SHARED_BYTES <= 99 * 1024 && THREADS >= BLOCK_N && ROWS * 4 <= BLOCK_N * 8 &&
                (Q_STAYS || Q_BYTES <= 2 * Side::BYTES));
  // In the end the sums of all warps lie where keys did, and what they are relative to where their places were.
  static_assert(WARPS_N * ROWS * HEAD_DIM * 4 <= STAGES * 2 * Side::BYTES &&
                WARPS_N * ROWS * 8 <= STAGES * BLOCK_N * 16);
};

// Tiled: FewRows or ManyRows.
template <Storage S, class L, class Tiled>
struct Attend : Tiled {
  using Base = Tiled;
  using Base::Base;
  using Base::QUANTISED, Base::tile, Base::c, Base::piece, Base::base, Base::thread, Base::lane, Base::warp_n,
      Base::key_stage, Base::value_stage;

  DUPLEX_DEVICE uint32_t places(int n) const { return base + L::PLACES + n % L::STAGES * L::BLOCK_N * 16; }
  DUPLEX_DEVICE uint32_t scales(int n) const { return base + L::SCALES + n % L::STAGES * L::BLOCK_N * 8; }

  // Where this thread's key of a block lies; no page where it is none.
  using Where = RowTile::Place;
  DUPLEX_DEVICE Where where_of(int t) const {
    if (thread >= L::BLOCK_N || t >= tile.keys.count()) return {-1, 0};
    const int32_t j = tile.keys.in_order(t) * L::BLOCK_N + thread;
    return j < piece.span.len_k ? tile.place_of(j) : Where{-1, 0};
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

  DUPLEX_DEVICE float scale_of(int key, uint32_t scales_of_block) const {
    return ptx::shared_load_float(scales_of_block + 4 * (warp_n * L::KEYS + key));
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
    this->put_queries();
    ptx::block_sync();
    typename Base::State state;
    start(*this, state);
    for (int t = 0; t < count; ++t) {
      ptx::copy_wait<L::STAGES - 2>();
      ptx::block_sync();
      copy_block(t + L::STAGES - 1, placed);
      put_place(t + L::STAGES, next);
      placed = next;
      next = where_of(t + L::STAGES + 1);
      add_block(
          *this, state, tile.keys.in_order(t), t, [&](int key) { return scale_of(key, scales(t)); },
          [&](int key) { return scale_of(key, scales(t) + 4 * L::BLOCK_N); });
    }
    ptx::copy_wait<0>();
    ptx::block_sync();
    this->put_sums(state);
    ptx::block_sync();
    for (int m = thread / 32; m < L::ROWS; m += L::WARPS) this->finish(m);
    ptx::block_sync();
  }
};

template <class T, Storage S, int HEAD_DIM, int ROWS>
DUPLEX_KERNEL((Tile<S, HEAD_DIM, ROWS>::THREADS))
attend_kernel(DUPLEX_PARAMETER Call c, DUPLEX_PARAMETER Grid grid) {
  ptx::let_next_launch_begin();
  const Share share(grid, ptx::block_index());
  if (grid.which != Which::SHARED && ptx::thread_index() < 32) clear_outside<T>(c, share);
  using L = Tile<S, HEAD_DIM, ROWS>;
  for_each_tile(c, share, L::BLOCK_N, [](const RowTile& tile) {
    if constexpr (ROWS == LARGE_ROWS)
      Attend<S, L, ManyRows<T, S, L>>(tile).run();
    else if (tile.rows() <= 8)
      Attend<S, L, FewRows<T, S, L, 1>>(tile).run();
    else
      Attend<S, L, FewRows<T, S, L, 2>>(tile).run();
  });
}

}  // namespace duplex::paged
