// Tiles on their way from the one thread that hands them out to all others of a block: what it works out about each,
// they only read. Whoever is done first takes the next tile, so that no block is left with the longest ones: which is
// why a block takes no tile before it has begun with the last.
#pragma once

#include "cuda/work.cuh"

namespace duplex::sm90 {

// A ticket in shared memory, at a multiple of 16. Full: it has been written. Empty: all have read it.
template <class W>
struct Tickets {
  static constexpr int UNITS = (sizeof(W) + 15) / 16, BYTES = 16 * UNITS + 16;

  union Ticket {
    Words4 units[UNITS];
    W work;
    DUPLEX_DEVICE Ticket() {}
  };

  uint32_t base;

  DUPLEX_DEVICE uint32_t full() const { return base + 16 * UNITS; }
  DUPLEX_DEVICE uint32_t empty() const { return full() + 8; }

  // By one thread, before the others come. Readers are whole warps and single threads.
  DUPLEX_DEVICE void init(int readers) const {
    ptx::barrier_init(full(), 1);
    ptx::barrier_init(empty(), readers);
  }

  // Until all have read the ticket before the n-th: they are past the tile before it.
  DUPLEX_DEVICE void wait_for_readers(int n) const { ptx::barrier_wait(empty(), (n & 1) ^ 1); }

  DUPLEX_DEVICE void write(int n, const W& work) const {
    Ticket x;
    x.work = work;
    wait_for_readers(n);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) ptx::shared_store16(base + 16 * u, x.units[u]);
    ptx::barrier_arrive(full());
  }

  template <bool WARP>
  DUPLEX_DEVICE W read(int n) const {
    Ticket x;
    ptx::barrier_wait(full(), n & 1);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) x.units[u] = ptx::shared_load16(base + 16 * u);
    if constexpr (WARP) ptx::warp_sync();
    if (!WARP || ptx::thread_index() % 32 == 0) ptx::barrier_arrive(empty());
    return x.work;
  }

  // f(work) for each tile: by a warp, or by a thread alone.
  template <bool WARP, class F>
  DUPLEX_DEVICE void for_each(F&& f) const {
    for (int n = 0;; ++n) {
      const W work = read<WARP>(n);
      if (work.batch < 0) return;
      f(work);
    }
  }
};

// Behind all else in a block's shared memory.
template <class S, class W>
constexpr int SHARED_WITH_TICKETS = S::SHARED_BYTES + Tickets<W>::BYTES;
template <class S, class W>
DUPLEX_DEVICE Tickets<W> tickets_of(uint32_t base) {
  static_assert(S::SHARED_BYTES % 16 == 0 && SHARED_WITH_TICKETS<S, W> <= 227 * 1024);
  return {base + S::SHARED_BYTES};
}

// The thread that hands out. Where entries are alike, what a block gets follows from the grid alone.
template <class W>
DUPLEX_DEVICE void hand_out(const Lengths& lengths, const Tiles& t, Tickets<W> tickets) {
  const int32_t entries = t.count(lengths);
  const int64_t tiles = int64_t(entries) * t.heads;
  int64_t tile = ptx::block_index();
  int n = 0;
  while (tile < tiles) {
    tickets.write(n, work_of<W>(lengths, t, entries, tile));
    ++n;
    if (t.order.data) {
      tickets.wait_for_readers(n);
      tile = ptx::blocks() + int64_t(ptx::add_to(t.order.taken(), 1));
    } else {
      tile = tile_of(n, ptx::block_index(), ptx::blocks());
    }
  }
  W none{};
  none.batch = -1;
  tickets.write(n, none);
}

}  // namespace duplex::sm90
