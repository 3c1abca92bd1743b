// The loader: one thread that keeps bulk copies in flight, as far ahead of the computing warps as the stages allow.
#pragma once

#include "cuda/sm90/shape.h"
#include "cuda/sm90/tickets.cuh"

namespace duplex::sm90 {

struct Maps {
  ptx::TensorMap q, k, v;  // (head_dim, row, head, batch)
};

// A tile of rows from `row` on, panel by panel, of which the barrier has been told.
template <class Tile>
DUPLEX_DEVICE void copy_tile(uint32_t to, const ptx::TensorMap& map, uint32_t barrier, int row, int head, int batch) {
#pragma unroll
  for (int p = 0; p < Tile::PANELS; ++p)
    ptx::copy_box(to + p * Tile::PANEL_BYTES, map, barrier, p * Tile::PANEL, row, head, batch);
}

template <class Tile>
DUPLEX_DEVICE void load_tile(uint32_t to, const ptx::TensorMap& map, uint32_t barrier, int row, int head, int batch) {
  ptx::barrier_expect(barrier, Tile::BYTES);
  copy_tile<Tile>(to, map, barrier, row, head, batch);
}

template <class S>
DUPLEX_DEVICE void load(const ForwardArguments& a, const Maps& maps, Shared<S> shared, Tickets<Work> tickets) {
  ptx::prefetch(maps.q);
  ptx::prefetch(maps.k);
  ptx::prefetch(maps.v);
  uint32_t step = 0, tiles = 0;  // blocks of keys and tiles so far
  tickets.for_each<false>([&](const Work& w) {
    const int count = w.keys.count(), kv_head = w.head / a.group;
    const int batch = a.lengths.cu_q ? 0 : w.batch;
    for (int t = 0; t < count; ++t, ++step) {
      const uint32_t stage = step % S::STAGES, empty = (step / S::STAGES & 1) ^ 1;
      const int row = w.row_k + w.keys.at(t) * S::BLOCK_N;
      ptx::barrier_wait(shared.k_empty(stage), empty);
      load_tile<typename S::Keys>(shared.k(stage), maps.k, shared.k_full(stage), row, kv_head, batch);
      if (t == 0) {
        const uint32_t q = tiles % S::Q_STAGES;
        ptx::barrier_wait(shared.q_empty(q), (tiles / S::Q_STAGES & 1) ^ 1);
        load_tile<typename S::Queries>(shared.q(q), maps.q, shared.q_full(q), w.row_q + w.i0, w.head, batch);
      }
      ptx::barrier_wait(shared.v_empty(stage), empty);
      load_tile<typename S::Keys>(shared.v(stage), maps.v, shared.v_full(stage), row, kv_head, batch);
    }
    tiles += count > 0;
  });
}

}  // namespace duplex::sm90
