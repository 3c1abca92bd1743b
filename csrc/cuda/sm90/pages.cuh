// Keys and values out of pages by bulk copies, for blocks of threads that have a warp to load them.
#pragma once

#include "cuda/paged/tiles.cuh"
#include "cuda/schedule.h"

namespace duplex::sm90 {

struct PageMaps {
  ptx::TensorMap k, v;  // (head_dim, slot, head, page)
  int box_rows;         // slots of a box, a power of two; divides a page, a block of keys and where parts begin
};

struct PagedArguments {
  paged::Call call;
  PageMaps maps;
  paged::Grid grid;
};

// f(share) for each of this block.
template <class F>
DUPLEX_DEVICE void for_each_share(const PagedArguments& a, F&& f) {
  const int32_t shares = a.grid.shares(), blocks = ptx::blocks();
  for (int32_t round = 0, start = 0; start < shares; ++round, start += blocks)
    if (const int32_t n = start + place_of_block(round, ptx::block_index(), blocks); n < shares)
      f(paged::Share(a.grid, n));
}

template <class S, class F>
DUPLEX_DEVICE void for_each_paged_tile(const PagedArguments& a, F&& f) {
  for_each_share(a, [&](const paged::Share& s) { paged::for_each_tile(a.call, s, S::BLOCK_N, f); });
}

// The loading warp: each lane brings a box of keys and one of values.
template <class S, class Room>
struct PageLoader {
  const PagedArguments& a;
  const Room shared;  // where stages lie, and their barriers
  const int lane = ptx::thread_index() % 32;
  uint32_t step = 0, tiles = 0;  // blocks of keys and tiles so far

  // Of the lane's box in block t of a tile's keys; no slot where it has none.
  using Where = paged::RowTile::Place;
  DUPLEX_DEVICE Where where_of(const paged::RowTile& tile, int t) const {
    const Where none{0, -1};
    if (t >= tile.keys.count() || lane * a.maps.box_rows >= S::BLOCK_N) return none;
    const int32_t j = Room::block_at(tile, t) * S::BLOCK_N + lane * a.maps.box_rows;
    return j < tile.piece.span.len_k ? tile.entry_of(j) : none;
  }

  DUPLEX_DEVICE void load(uint32_t to, const ptx::TensorMap& map, uint32_t full, int rows, Where at, int head) const {
    using Keys = typename S::Keys;
    if (lane == 0) ptx::barrier_expect(full, rows * 2 * Keys::COLUMNS);
    ptx::warp_sync();
    if (at.slot < 0) return;
    to += lane * a.maps.box_rows * Keys::ROW_BYTES;
#pragma unroll
    for (int p = 0; p < Keys::PANELS; ++p)
      ptx::copy_box(to + p * Keys::PANEL_BYTES, map, full, p * Keys::PANEL, at.slot, head, at.page);
  }

  DUPLEX_DEVICE void run() {
    ptx::prefetch(a.maps.k);
    ptx::prefetch(a.maps.v);
    for_each_paged_tile<S>(a, [&](const paged::RowTile& tile) {
      const int count = tile.keys.count(), head = tile.share.kv_head;
      Where next = where_of(tile, 0), later = where_of(tile, 1);  // what the table says is not waited for here
      shared.wait_for_tile(tiles++);
      for (int t = 0; t < count; ++t, ++step) {
        const Where at{tile.page(next.page), next.slot};
        const int live = int(tile.piece.span.len_k) - Room::block_at(tile, t) * S::BLOCK_N;
        const int rows =
            ((live < S::BLOCK_N ? live : S::BLOCK_N) + a.maps.box_rows - 1) & -a.maps.box_rows;  // of boxes
        const uint32_t stage = step % S::STAGES, empty = (step / S::STAGES & 1) ^ 1;
        ptx::barrier_wait(shared.k_empty(stage), empty);
        load(shared.k(stage), a.maps.k, shared.k_full(stage), rows, at, head);
        ptx::barrier_wait(shared.v_empty(stage), empty);
        load(shared.v(stage), a.maps.v, shared.v_full(stage), rows, at, head);
        next = later;
        later = where_of(tile, t + 2);
      }
    });
  }
};

}  // namespace duplex::sm90
