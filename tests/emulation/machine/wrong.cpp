// Kernels that are wrong on purpose, and arithmetic that needs no machine, behind plain functions.
#include "cuda/device.cuh"
#include "cuda/distance_sums.h"
#include "cuda/divider.h"
#include "cuda/key_blocks.h"
#include "cuda/prepare.h"
#include "cuda/row_blocks.h"
#include "cuda/row_sums.h"
#include "cuda/schedule.h"
#include "report.h"

namespace {

using namespace duplex;
constexpr int SHARED = 96 * 1024;
constexpr Major K = Major::K;

// A tile of 64 rows that is copied, multiplied with itself, and added to: with one thing left out.
enum Wrong { NOTHING, FENCE_OF_WRITES, BARRIER, WAIT, TOUCHED, FENCE, BYTES, ARRIVALS, COPY_FENCE, LANES };

DUPLEX_KERNEL(128) wrong(DUPLEX_PARAMETER ptx::TensorMap map, int kind, float* d) {
  const uint32_t barrier = ptx::shared_base(), tile = barrier + 1024;
  const int thread = ptx::thread_index();
  if (thread == 0) ptx::barrier_init(barrier, 1);
  if (kind == COPY_FENCE && thread == 0) ptx::shared_store(tile, 0);
  ptx::block_sync();
  if (thread == 0) {
    ptx::barrier_expect(barrier, kind == BYTES ? 64 * 128 + 16 : 64 * 128);
    if (kind == ARRIVALS) ptx::barrier_arrive(barrier);
    ptx::copy_box(tile, map, barrier, 0, 0, 0, 0);
  }
  if (kind != BARRIER) ptx::barrier_wait(barrier, 0);
  ptx::shared_store(tile + 4 * thread, ptx::shared_load(tile + 4 * thread));
  if (kind != FENCE_OF_WRITES) ptx::fence_async_proxy();
  ptx::block_sync();
  float x[32];
  for (float& y : x) y = 0;
  if (kind != FENCE) ptx::wgmma_fence();
  const uint64_t a = descriptor(tile, 0, 16, 1024, 128);
  if (kind != LANES || thread != 5) ptx::wgmma<Bfloat16, K, K>(x, a, a, true);
  ptx::wgmma_commit();
  if (kind == TOUCHED) x[3] = 1;
  if (kind != WAIT) ptx::wgmma_wait<0>();
  for (int n = 0; n < 32; ++n) d[32 * thread + n] = x[n];
  if (kind == WAIT) ptx::wgmma_wait<0>();
}

// Tiles of 64 rows that are copied in two stages, multiplied with themselves and summed: with one thing left out, or
// done in the wrong place.
enum WrongStages { RIGHT, UNWAITED, WAIT_FOR_LESS, UNSYNCED, SYNC_OF_WARP, TOO_EARLY, NEVER_WAITED, TWICE, AWAY };

DUPLEX_KERNEL(128) wrong_stages(const uint16_t* x, int tiles, int kind, float* d) {
  using Rows = Tile<64, 64>;
  const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32;
  const auto place = [&](int t) { return ptx::shared_base() + t % 2 * Rows::BYTES; };
  const auto load = [&](int t) {
    for (int n = thread; t < tiles && n < 64 * 8; n += 128) {
      const uint32_t to = place(t) + swizzled(n / 8, kind == TWICE && n == 1 ? 0 : n % 8, Rows::ROW_BYTES);
      ptx::copy_async<16>(to, x + (t * 64 + n / 8) * 64 + n % 8 * 8, 16);
    }
    ptx::copy_commit();
  };
  float sums[32];
  for (float& y : sums) y = 0;
  load(0);
  for (int t = 0; t < tiles; ++t) {
    if (kind == TOO_EARLY) load(t + 1);
    if (kind == TOO_EARLY || kind == WAIT_FOR_LESS)
      ptx::copy_wait<1>();
    else if (kind != UNWAITED)
      ptx::copy_wait<0>();
    if (kind == SYNC_OF_WARP)
      ptx::warp_sync();
    else if (kind != UNSYNCED)
      ptx::block_sync();
    if (kind != TOO_EARLY) load(t + 1);
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4], b[4];
      ptx::load_matrices(a, place(t) + swizzled(16 * warp + lane % 16, 2 * k + lane / 16, Rows::ROW_BYTES));
      for (int n = 0; n < 4; ++n) {
        const int row = 16 * n + lane % 8 + lane / 16 * 8, unit = 2 * k + lane / 8 % 2;
        ptx::load_matrices(b, place(t) + swizzled(row, unit, Rows::ROW_BYTES));
        if (kind == AWAY && thread == 5) continue;
        ptx::mma<Bfloat16>(sums + 8 * n, a, b[0], b[1]);
        ptx::mma<Bfloat16>(sums + 8 * n + 4, a, b[2], b[3]);
      }
    }
  }
  if (kind == NEVER_WAITED) {
    ptx::copy_async<16>(place(0) + 16 * thread, x, 16);
    ptx::copy_commit();
  }
  for (int n = 0; n < 32; ++n) d[32 * thread + n] = sums[n];
}

// Numbers staged twice and added to memory: with one thing left out, or done in the wrong place.
enum WrongReduction { SOUND, UNFENCED, UNREAD, UNFINISHED, UNCOMMITTED, UNMET, UNALIGNED };

DUPLEX_KERNEL(128) wrong_reduction(const float* x, int kind, float* sums) {
  const uint32_t staged = ptx::shared_base();
  const int thread = ptx::thread_index();
  for (int n = 0; n < 2; ++n) {
    ptx::shared_store(staged + 4 * thread, x[128 * n + thread]);
    if (kind != UNFENCED) ptx::fence_async_proxy();
    if (kind != UNMET) ptx::block_sync();
    if (thread == 0) {
      ptx::reduce_bytes(sums, staged + 4 * (kind == UNALIGNED), 512);
      if (kind != UNCOMMITTED) ptx::reduce_commit();
      if (kind != UNREAD) ptx::reduce_wait_read<0>();
    }
    ptx::block_sync();
  }
  if (thread == 0 && kind != UNFINISHED) ptx::reduce_wait<0>();
}

// Launched ahead, it copies what the launch before wrote: without waiting for that, or in one thread.
enum WrongLaunch { WAITED, NOT_WAITED, ONE_WAITED };

DUPLEX_KERNEL(128) wrong_launch(const float* x, int kind, float* y) {
  const int thread = ptx::thread_index();
  if (kind == WAITED || (kind == ONE_WAITED && thread == 0)) ptx::wait_for_launch_before();
  y[thread] = x[thread];
}

}  // namespace

EXPORTED const char* probe_wrong(int kind, const Box* box, float* d) {
  return report([&] { launch<wrong>("", 1, 128, SHARED, nullptr, encode(*box), kind, d); });
}

EXPORTED const char* probe_wrong_stages(int kind, const uint16_t* x, int tiles, float* d) {
  return report([&] { launch<wrong_stages>("", 1, 128, SHARED, nullptr, x, tiles, kind, d); });
}

EXPORTED const char* probe_wrong_reduction(int kind, const float* x, float* sums) {
  return report([&] { launch<wrong_reduction>("", 1, 128, SHARED, nullptr, x, kind, sums); });
}

EXPORTED const char* probe_wrong_launch(int kind, const float* x, float* y) {
  return report([&] { launch<wrong_launch>("", 1, 128, SHARED, Stream{nullptr, true}, x, kind, y); });
}

// Arithmetic that needs no machine.

EXPORTED int key_blocks_of(int64_t len_k, int64_t prefix, int64_t offset, int64_t left, int64_t right, int64_t i0,
                           int64_t i1, int block, int* edges, int* visited) {
  const KeyBlocks keys = key_blocks({len_k, prefix, offset, left, right}, i0, i1, block);
  *edges = keys.edges();
  for (int t = 0; t < keys.count(); ++t) visited[t] = keys.at(t);
  return keys.count();
}

EXPORTED int key_blocks_in_order(int64_t len_k, int64_t prefix, int64_t offset, int64_t left, int64_t right, int64_t i0,
                                 int64_t i1, int block, int* visited, int* is_edge) {
  const KeyBlocks keys = key_blocks({len_k, prefix, offset, left, right}, i0, i1, block);
  for (int t = 0; t < keys.count(); ++t) {
    visited[t] = keys.in_order(t);
    is_edge[t] = keys.is_edge(visited[t]);
  }
  return keys.count();
}

EXPORTED int row_blocks_of(int64_t len_k, int64_t prefix, int64_t offset, int64_t left, int64_t right, int64_t len_q,
                           int64_t j0, int64_t j1, int block, int* edges, int* visited) {
  const RowBlocks rows = row_blocks({len_k, prefix, offset, left, right}, len_q, j0, j1, block);
  *edges = rows.edges();
  for (int t = 0; t < rows.count(); ++t) visited[t] = rows.at(t);
  return rows.count();
}

EXPORTED void quotients_of(int64_t divisor, int count, const uint32_t* numbers, uint32_t* quotients) {
  const Divider divider = Divider::of(divisor);
  for (int n = 0; n < count; ++n) quotients[n] = divider.quotient(numbers[n]);
}

EXPORTED int64_t sums_start_of(const Lengths* lengths, int b) {
  return b < lengths->batch ? RowSums::start(*lengths, b, query_rows(*lengths, b).row) : RowSums::rows(*lengths);
}

EXPORTED int distance_heads_of(int64_t tiles, int processors, int heads, int radius, int longest, int64_t bytes,
                               int64_t* floats) {
  const DistanceSums s = distance_sums(tiles, processors, heads, radius, longest, bytes);
  *floats = s.place(s.count, 0);
  return s.heads;
}

EXPORTED void places_of(int entries, int heads, int section, int blocks, int64_t rounds, int64_t* tiles, int* ranks,
                        int* head) {
  for (int64_t round = 0; round < rounds; ++round)
    for (int n = 0; n < blocks; ++n, ++tiles, ++ranks, ++head) {
      *tiles = tile_of(round, n, blocks);
      if (*tiles >= int64_t(entries) * heads) continue;
      const TilePlace place = place_of(*tiles, entries, heads, section);
      *ranks = place.rank;
      *head = place.head;
    }
}

EXPORTED const char* schedule_of(const Lengths* lengths, const Entries* entries, int* order) {
  return report([&] { schedule(*lengths, *entries, Order{order}, nullptr); });
}

EXPORTED int cost_of(const Lengths* lengths, const Entries* entries, int entry) {
  return cost(*entries, *lengths, entry);
}
