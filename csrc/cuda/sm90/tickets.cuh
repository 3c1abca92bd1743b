// Tiles on their way from the one thread that hands them out to all others of a block: what it works out about each,
// they only read. Whoever is done first takes the next tile, so that no block is left with the longest ones.
#pragma once

#include "cuda/work.cuh"

namespace duplex::sm90 {

// Of tickets in shared memory, from a multiple of 16 on. Full: it has been written. Empty: all have read it.
template <class W>
struct Tickets {
  static constexpr int COUNT = 2, UNITS = (sizeof(W) + 15) / 16, TICKET_BYTES = 16 * UNITS;
  static constexpr int BYTES = COUNT * (TICKET_BYTES + 16);

  union Ticket {
    Words4 units[UNITS];
    W work;
    DUPLEX_DEVICE Ticket() {}
  };

  uint32_t base;

  DUPLEX_DEVICE uint32_t ticket(int n) const { return base + n % COUNT * TICKET_BYTES; }
  DUPLEX_DEVICE uint32_t full(int n) const { return base + COUNT * TICKET_BYTES + n % COUNT * 8; }
  DUPLEX_DEVICE uint32_t empty(int n) const { return full(n) + COUNT * 8; }
  DUPLEX_DEVICE static int phase(uint32_t n) { return n / COUNT & 1; }

  // By one thread, before the others come. Readers are whole warps and single threads.
  DUPLEX_DEVICE void init(int readers) const {
    for (int n = 0; n < COUNT; ++n) {
      ptx::barrier_init(full(n), 1);
      ptx::barrier_init(empty(n), readers);
    }
  }

  DUPLEX_DEVICE void write(int n, const W& work) const {
    Ticket x;
    x.work = work;
    ptx::barrier_wait(empty(n), phase(n) ^ 1);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) ptx::shared_store16(ticket(n) + 16 * u, x.units[u]);
    ptx::barrier_arrive(full(n));
  }

  // Until all have read it: they have begun its tile.
  DUPLEX_DEVICE void wait_for_readers(int n) const { ptx::barrier_wait(empty(n), phase(n)); }

  template <bool WARP>
  DUPLEX_DEVICE W read(int n) const {
    Ticket x;
    ptx::barrier_wait(full(n), phase(n));
#pragma unroll
    for (int u = 0; u < UNITS; ++u) x.units[u] = ptx::shared_load16(ticket(n) + 16 * u);
    if constexpr (WARP) ptx::warp_sync();
    if (!WARP || ptx::thread_index() % 32 == 0) ptx::barrier_arrive(empty(n));
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

// Blocks of keys, or of rows of all heads that share keys, in sequences whose tiles are short.
constexpr int SHORT = 2;

// The thread that hands out. Where entries are alike, what a block gets follows from the grid alone. Where they are
// not, a block takes no tile before it has begun the last one, as others could begin it sooner. But in short sequences
// the next would not be there in time, and their tiles are so alike that it does not matter who has which.
template <class W>
DUPLEX_DEVICE void hand_out(const Lengths& lengths, const Tiles& t, Tickets<W> tickets, int group = 1) {
  const int32_t entries = t.count(lengths);
  const int64_t tiles = int64_t(entries) * t.heads;
  int64_t tile = ptx::block_index();
  int n = 0;
  for (; tile < tiles; ++n) {
    const W work = work_of<W>(lengths, t, entries, tile);
    tickets.write(n, work);
    if (t.order.data) {
      const bool late = t.entries.keys ? int64_t(work.len_q) * group > SHORT * t.entries.block_m
                                       : work.len_k > SHORT * t.entries.block_n;
      if (late) tickets.wait_for_readers(n);
      tile = ptx::blocks() + int64_t(ptx::add_to(t.order.taken(), 1));
    } else {
      tile = tile_of(n + 1, ptx::block_index(), ptx::blocks());
    }
  }
  W none{};
  none.batch = -1;
  tickets.write(n, none);
}

}  // namespace duplex::sm90
