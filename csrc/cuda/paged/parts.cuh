// Rows whose results lie in parts: a few lanes of a warp take a head of one, or, of many parts, teams of so many lanes
// each, whose results meet in shared memory.
#pragma once

#include "cuda/merge_row.cuh"
#include "cuda/paged/call.h"

namespace duplex::paged {

constexpr int PARTS_THREADS = 128;

// Powers of two, by their logarithms: how many rows of a union have blocks of their own, how many blocks the heads of
// a row take, how many lanes a team, how many teams a head.
struct PartsShape {
  int32_t log2_rows, log2_blocks, log2_lanes, log2_teams;
};

// What teams made of their parts, in shared memory: numbers by runs, then each team's lse. Of rows in runs of 16 bytes.
struct Teams {
  static constexpr int COUNT = 4, RUNS = MERGE_RUNS<COUNT>;
  static constexpr int LSES = PARTS_THREADS * RUNS * COUNT * 4, SHARED_BYTES = LSES + PARTS_THREADS * 4;

  const Lanes lanes;

  DUPLEX_DEVICE static uint32_t lse_at(int team) { return ptx::shared_base() + LSES + 4 * team; }
  DUPLEX_DEVICE uint32_t run_at(int team, int run) const {
    return ptx::shared_base() + ((team * RUNS + run) * lanes.width() + lanes.lane()) * COUNT * 4;
  }

  DUPLEX_DEVICE void put(int column, const float (&x)[COUNT]) const {
    ptx::shared_store16(run_at(lanes.row(), column / COUNT >> lanes.log2), narrow_run<Float32>(x));
  }
  DUPLEX_DEVICE void put_lse(float lse) const {
    if (lanes.lane() == 0) ptx::shared_store(lse_at(lanes.row()), lse);
  }

  // As merge_rows, of `count` teams from this one on.
  template <class Store>
  DUPLEX_DEVICE float merge(int count, float sink, int dim, Store&& store) const {
    const auto lse_of = [&](int t) { return ptx::shared_load_float(lse_at(lanes.row() + t)); };
    RowSum<COUNT> sum;
    float largest = sink;
    for (int t = 0; t < count; ++t) largest = fmaxf(largest, lse_of(t));
    Weights weights(largest, sink);
#pragma unroll 1
    for (int t = 0; t < count; ++t) {
      const float weight = weights.of(lse_of(t));
      if (weight == 0) continue;  // NaN goes on
      weights.total += weight;
#pragma unroll
      for (int r = 0; r < RUNS; ++r) {
        float x[COUNT];
        widen_run<Float32>(ptx::shared_load16(run_at(lanes.row() + t, r)), x);
        sum.add(r, x, weight);
      }
    }
    sum.finish(lanes, weights.inverse(), dim, store);
    return weights.lse();
  }
};

template <class T, int COUNT>
DUPLEX_KERNEL_SHARING(PARTS_THREADS, 4)
parts_kernel(DUPLEX_PARAMETER Call c, PartsShape shape) {
  const Lanes lanes(shape.log2_lanes);
  const int log2_teams = COUNT == Teams::COUNT ? shape.log2_teams : 0, count = 1 << log2_teams;
  const int block = ptx::block_index(), rows = 1 << shape.log2_rows;
  const int head_block = block & ((1 << shape.log2_blocks) - 1), row_block = block >> shape.log2_blocks & (rows - 1);
  const int place = head_block * (PARTS_THREADS >> shape.log2_lanes) + lanes.row();
  const int own = place >> log2_teams, team = place & (count - 1);
  const bool live = own < c.heads_q;
  const int head = live ? own : 0, n = block >> (shape.log2_blocks + shape.log2_rows);
  Union u;
  const bool found = c.plan ? union_of(c.batch, c.plan, c.capacity, n, u) : union_of(c.batch, c.division, n, u);
  ptx::wait_for_launch_before();
  if (!found) return;
  const float sink = c.sink ? c.sink[head] : -INFINITY;
  const auto* numbers = reinterpret_cast<const uint32_t*>(c.parts) + int64_t(head) * c.head_dim_v;
  const float* lses = c.parts_lse + int64_t(head) * c.slots;
  const int parts = u.shared + u.own, each = (parts + count - 1) >> log2_teams;  // of a team: one has fewer
  for (int32_t row = u.row + row_block; row < u.row_end; row += rows) {
    const auto slot = [&](int t) {
      const int part = t << log2_teams | team;
      return int32_t(u.slot(part < parts ? part : parts - 1, row));
    };
    auto* to = c.out.template at<typename T::Stored>(0, row, head);
    const auto store = [&](int column, const float (&x)[COUNT]) {
      if (live && team == 0) store_vector<T>(to + column, x);
    };
    float lse = merge_rows<Float32, COUNT>(
        lanes, each, count > 1 ? -INFINITY : sink, c.head_dim_v,
        [&](int t) { return (t << log2_teams | team) < parts ? lses[slot(t)] : -INFINITY; },
        [&](int t) { return numbers + slot(t) * (int64_t(c.heads_q) * c.head_dim_v); },
        [&](int column, const float (&x)[COUNT]) {
          if constexpr (COUNT == Teams::COUNT)
            if (count > 1) return Teams{lanes}.put(column, x);
          store(column, x);
        });
    if constexpr (COUNT == Teams::COUNT)
      if (count > 1) {
        const Teams teams{lanes};
        teams.put_lse(lse);
        ptx::block_sync();
        if (team == 0) lse = teams.merge(count, sink, c.head_dim_v, store);
        ptx::block_sync();
      }
    if (live && team == 0 && lanes.lane() == 0) c.lse[int64_t(head) * c.batch.rows_q + row] = lse;
  }
}

}  // namespace duplex::paged
