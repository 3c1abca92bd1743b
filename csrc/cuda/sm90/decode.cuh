// Decoding for Hopper: tiles of 16 packed rows. One warp brings boxes of slots by bulk copies, so that the others spend
// no instructions on what moves; each of these has all rows and 16 keys of a block, by mma.sync.
#pragma once

#include "cuda/paged/few_rows.cuh"
#include "cuda/sm90/pages.cuh"

namespace duplex::sm90 {

template <Storage S, int HEAD_DIM_>
struct DecodeShape {
  static constexpr int HEAD_DIM = HEAD_DIM_, ROWS = 16, BLOCK_M = ROWS;
  static constexpr int BLOCK_N = HEAD_DIM == 256 && S == Storage::AS_QUERIES ? 32 : 64;
  static constexpr int WARPS_M = 1, WARPS_N = BLOCK_N / 16, WARPS = WARPS_N, KEYS = 16;  // that compute; keys of each
  static constexpr int COMPUTING = 32 * WARPS, THREADS = COMPUTING + 32;
  // On a multiprocessor, where registers and memory allow. Bytes take arithmetic more than time to arrive.
  static constexpr int BLOCKS = HEAD_DIM == 256 ? 1 : S == Storage::AS_QUERIES ? 2 : 3;
  using Keys = Tile<BLOCK_N, HEAD_DIM * paged::STORED_BYTES<S> / 2>;  // two bytes a number as if they were one
  using Side = Keys;
  static constexpr bool CONVERTS = true;            // float8 in hardware
  static constexpr bool Q_STAYS = HEAD_DIM == 256;  // queries are in registers, which the widest have none left for
  static constexpr int FITTING = (BLOCKS == 3 ? 64 * 1024 : 192 * 1024 / BLOCKS) / (2 * Keys::BYTES),
                       STAGES = FITTING < 6 ? FITTING : 6;

  static constexpr int KV = 0, Q = KV + STAGES * 2 * Keys::BYTES, STATE = Q + ROWS * HEAD_DIM * 2;
  static constexpr int UNITS = STATE + WARPS * ROWS * 8, BARRIERS = UNITS + ROWS * 4,
                       SHARED_BYTES = BARRIERS + 8 * (1 + 2 * STAGES);
  static_assert(STAGES >= 2 && BLOCKS * (SHARED_BYTES + 1024) <= 228 * 1024);
  static_assert(WARPS * ROWS * HEAD_DIM * 4 <= STAGES * 2 * Keys::BYTES);  // in the end sums lie where keys did
};

template <class L>
struct DecodeStages {
  uint32_t base;

  DUPLEX_DEVICE uint32_t k(int stage) const { return base + L::KV + stage * 2 * L::Keys::BYTES; }
  DUPLEX_DEVICE uint32_t v(int stage) const { return k(stage) + L::Keys::BYTES; }
  // Full: its bytes have come, of keys and of values. Empty: every warp that computes has read it.
  DUPLEX_DEVICE uint32_t barrier(int n) const { return base + L::BARRIERS + 8 * n; }
  DUPLEX_DEVICE uint32_t full(int stage) const { return barrier(1 + stage); }
  DUPLEX_DEVICE uint32_t empty(int stage) const { return barrier(1 + L::STAGES + stage); }
  DUPLEX_DEVICE uint32_t k_full(int stage) const { return full(stage); }
  DUPLEX_DEVICE uint32_t v_full(int stage) const { return full(stage); }
  DUPLEX_DEVICE uint32_t k_empty(int stage) const { return empty(stage); }
  DUPLEX_DEVICE uint32_t v_empty(int stage) const { return empty(stage); }
  DUPLEX_DEVICE static int block_at(const paged::RowTile& tile, int t) { return tile.keys.in_order(t); }
  // The sums of a tile have been read, which lay where keys are to be.
  DUPLEX_DEVICE uint32_t tile_done() const { return barrier(0); }
  DUPLEX_DEVICE void wait_for_tile(int tiles) const {
    if (tiles > 0) ptx::barrier_wait(tile_done(), (tiles - 1) & 1);
  }

  DUPLEX_DEVICE void init() const {
    ptx::barrier_init(tile_done(), L::WARPS);
    for (int n = 0; n < L::STAGES; ++n) {
      ptx::barrier_init(full(n), 2);
      ptx::barrier_init(empty(n), L::WARPS);
    }
    ptx::barrier_init_fence();
  }
};

// With twice the sums, there are no registers left for queries.
template <class L>
struct QueriesStay : L {
  static constexpr bool Q_STAYS = true;
};
template <class T, Storage S, class L, int TILES>
using DecodeRows = paged::FewRows<T, S, std::conditional_t<TILES == 1, L, QueriesStay<L>>, TILES>;

template <class T, Storage S, class L, int TILES>
struct Decode : DecodeRows<T, S, L, TILES> {
  using Base = DecodeRows<T, S, L, TILES>;
  using Base::QUANTISED, Base::tile, Base::c, Base::piece, Base::thread, Base::lane, Base::warp_n;

  const DecodeStages<L> shared;
  int& step;  // blocks of keys so far

  DUPLEX_DEVICE Decode(const paged::RowTile& tile, DecodeStages<L> shared, int& step)
      : Base(tile), shared(shared), step(step) {}

  DUPLEX_DEVICE void meet() const { ptx::named_sync(1, L::COMPUTING); }
  DUPLEX_DEVICE void release(uint32_t barrier) const {
    if (lane == 0) ptx::barrier_arrive(barrier);
  }

  // Of the warp's keys in a block, how many are there, or more.
  DUPLEX_DEVICE int live(int block) const { return int(piece.span.len_k) - block * L::BLOCK_N - warp_n * L::KEYS; }

  // Values of the warp that are none: what lies there may be NaN.
  DUPLEX_DEVICE void clear_strangers(int live) const {
    if (live >= L::KEYS) return;
    constexpr int UNITS = L::Keys::ROW_BYTES / 16;
    const int first = warp_n * L::KEYS + (live > 0 ? live : 0), end = (warp_n + 1) * L::KEYS;
    for (int u = first * UNITS + lane; u < end * UNITS; u += 32)
      for (int p = 0; p < L::Keys::PANELS; ++p)
        ptx::shared_zero16(shared.v(step % L::STAGES) + p * L::Keys::PANEL_BYTES + u * 16);
    ptx::fence_async_proxy();
    ptx::warp_sync();
  }

  // Lane n has what the n-th of the warp's keys, and the 16 after them, are worth.
  struct Scales {
    float k, v;
  };
  using Where = paged::RowTile::Place;
  DUPLEX_DEVICE Where where_of(int block) const {
    const int thread = ptx::anew(this->thread);
    const int32_t j = block * L::BLOCK_N + thread / 32 * L::KEYS + thread % L::KEYS;
    if (!QUANTISED || block < 0 || j >= int32_t(piece.span.len_k)) return {0, -1};
    return tile.entry_of(j);
  }
  DUPLEX_DEVICE int block_at(int t) const { return t < tile.keys.count() ? tile.keys.in_order(t) : -1; }
  DUPLEX_DEVICE Scales scales_at(Where at) const {
    if (!QUANTISED || at.slot < 0) return {0, 0};
    const int32_t page = tile.page(at.page);
    const auto read = [&](const ScaleView& s) {  // whose strides fit (attention.cpp)
      const auto place = [](uint32_t n, int64_t stride) { return uint64_t(n) * uint32_t(stride); };
      return s ? s.data[place(page, s.page) + place(at.slot, s.slot) + place(tile.share.kv_head, s.head)] : 0.f;
    };
    return {read(c.pages.k_scales), read(c.pages.v_scales)};
  }

  DUPLEX_DEVICE void run() {
    const int count = tile.keys.count();
    int block = block_at(0), next = block_at(1);  // next: after this one
    Scales scales = scales_at(where_of(block));
    Where where = where_of(next);
    this->put_queries(8 * TILES);
    meet();
    typename Base::State state;
    paged::start(*this, state);
    for (int t = 0; t < count; ++t, ++step) {
      const Scales now = scales;
      const int later = block_at(t + 2);
      scales = scales_at(where);
      where = where_of(later);
      ptx::barrier_wait(shared.full(step % L::STAGES), step / L::STAGES & 1);
      clear_strangers(live(block));
      paged::add_block(
          *this, state, block, step, [&](int key) { return ptx::shuffle(now.k, key); },
          [&](int key) { return ptx::shuffle(now.v, key); });
      release(shared.empty(step % L::STAGES));
      block = next;
      next = later;
    }
    meet();
    this->put_sums(state);
    meet();
    for (int m = thread / 32; m < 8 * TILES; m += L::WARPS) this->finish(m);
    ptx::fence_async_proxy();
    ptx::warp_sync();
    release(shared.tile_done());
  }
};

template <class T, Storage S, int HEAD_DIM, class L = DecodeShape<S, HEAD_DIM>>
DUPLEX_KERNEL_SHARING(L::THREADS, L::BLOCKS)
decode_kernel(DUPLEX_PARAMETER PagedArguments a) {
  const DecodeStages<L> shared{ptx::shared_base()};
  ptx::let_next_launch_begin();
  if (ptx::thread_index() == 0) shared.init();
  ptx::block_sync();
  if (ptx::uniform(ptx::thread_index() / 32) == L::WARPS) {
    PageLoader<L, DecodeStages<L>>{a, shared}.run();
    if (a.grid.which != paged::Which::SHARED)
      for_each_share(a, [&](const paged::Share& s) { paged::clear_outside<T>(a.call, s); });
  } else {
    int step = 0;
    for_each_paged_tile<L>(a, [&](const paged::RowTile& tile) {
      tile.rows() <= 8 ? Decode<T, S, L, 1>(tile, shared, step).run() : Decode<T, S, L, 2>(tile, shared, step).run();
    });
  }
}

}  // namespace duplex::sm90
