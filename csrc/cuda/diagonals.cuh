// dS, in accumulators (as in softmax.cuh), summed along its diagonals into a team's slot. First squares of 8 x 8 on one
// diagonal are added to each other as they lie, then the rows of squares, turned so that distances lie below each
// other, then what the warps of a team have: each distance in a fixed order, by a single thread in the end.
#pragma once

#include "cuda/softmax.cuh"

namespace duplex {

// Four warps with successive rows, against the same keys.
struct Team {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;

  uint32_t shared;
  int thread, barrier;

  DUPLEX_DEVICE void meet() const { ptx::named_sync(barrier, THREADS); }
};

// A head's table in a slot: entry `distance` is at middle[distance], and what lies further away is added to its ends.
struct DistanceTable {
  float* middle;
  int radius;
};

// What a thread has that belongs to the ends of the table.
struct Ends {
  float sums[2] = {0, 0};

  DUPLEX_DEVICE void add(bool high, float x) {
    sums[0] += high ? 0 : x;
    sums[1] += high ? x : 0;
  }
};

// WARP_ROWS rows of each warp against BLOCK_N keys.
template <int WARP_ROWS, int BLOCK_N>
struct Diagonals {
  static constexpr int TALL = WARP_ROWS / 8, WIDE = BLOCK_N / 8;  // in squares of 8 x 8
  static constexpr int FOLDED = WIDE + TALL - 1, SKEWED = FOLDED + 1, OWN = (SKEWED + 7) / 8;
  static constexpr int PLACES = 8 * SKEWED;  // distances of a warp, from -WARP_ROWS on
  static constexpr int TEAM_ROWS = Team::WARPS * WARP_ROWS, TEAM_PLACES = PLACES + TEAM_ROWS - WARP_ROWS;
  static constexpr int EACH = (TEAM_PLACES + Team::THREADS - 1) / Team::THREADS;  // distances that a thread has at last
  static constexpr int COUNT = BLOCK_N / 2;                                       // accumulators of 16 rows
  static constexpr int BYTES = 4 * Team::WARPS * PLACES;

  // ds(r, n) is the n-th accumulator of the r-th 16 rows.
  template <class F>
  DUPLEX_DEVICE static void fold(F&& ds, float (&folded)[COUNT]) {
    static_assert(2 * FOLDED <= COUNT);
#pragma unroll
    for (int h = 0; h < FOLDED; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int first = h < TALL ? TALL - 1 - h : 0, last = h < WIDE ? TALL - 1 : TALL + WIDE - 2 - h;
        const auto square = [&](int a) { return ds(a / 2, 4 * (h - (TALL - 1) + a) + 2 * (a % 2) + e); };
        folded[2 * h + e] = square(first);
#pragma unroll
        for (int a = first + 1; a <= last; ++a) folded[2 * h + e] += square(a);
      }
  }

  // Row r of a square turns r columns to the left. A lane has columns in pairs, so that is a turn among four lanes;
  // what leaves a square on the left enters the one before.
  DUPLEX_DEVICE static int turn(int row, int e) { return (row + e) / 2; }

  DUPLEX_DEVICE static void skew(const float (&folded)[COUNT], int row, int column, float (&x)[COUNT]) {
    static_assert(2 * SKEWED <= COUNT);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool odd = row % 2, leaves = column < turn(row, e);
      const auto from = [&](int g) {
        return g < 0 || g >= FOLDED ? 0 : odd ? folded[2 * g + 1 - e] : folded[2 * g + e];
      };
#pragma unroll
      for (int g = 0; g < SKEWED; ++g) x[2 * g + e] = leaves ? from(g) : from(g - 1);
    }
  }

  // Over the rows of squares, two that differ by BIT at a time, of which each keeps every other square: in the end a
  // lane has x[2 * m + e] of square 8 * m + row.
  template <int BIT = 1, int LEFT = SKEWED>
  DUPLEX_DEVICE static void sum_rows(int row, int column, float (&x)[COUNT]) {
    constexpr int KEPT = (LEFT + 1) / 2;
    const bool upper = row & BIT;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int partner = 4 * (row ^ BIT) + ((column + turn(row ^ BIT, e) - turn(row, e)) & 3);
#pragma unroll
      for (int m = 0; m < KEPT; ++m) {
        const float even = x[4 * m + e], odd = 2 * m + 1 < LEFT ? x[4 * m + 2 + e] : 0;
        x[2 * m + e] = (upper ? odd : even) + ptx::shuffle(upper ? even : odd, partner);
      }
    }
    if constexpr (BIT < 4) sum_rows<2 * BIT, KEPT>(row, column, x);
  }

  // `distance` is the first key's from the team's first row. The team has met since it was here last. `folded` and `x`
  // are registers that are free, also those of ds.
  template <class F>
  DUPLEX_DEVICE static void add(const Team& team, const DistanceTable& t, int distance, F&& ds, float (&folded)[COUNT],
                                float (&x)[COUNT], Ends& ends) {
    const bool low = distance + BLOCK_N - 1 <= -t.radius, high = distance - (TEAM_ROWS - 1) >= t.radius;
    if (low || high) {  // all of it lies beyond the table
      float sum = 0;
#pragma unroll
      for (int r = 0; r < TALL / 2; ++r)
#pragma unroll
        for (int n = 0; n < COUNT; ++n) sum += ds(r, n);
      ends.add(high, sum);
      return;
    }
    const int first = distance - TEAM_ROWS + team.thread;
    float before[EACH];  // asked for early
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int d = first + n * Team::THREADS;
      before[n] = -t.radius < d && d < t.radius ? t.middle[d] : 0;
    }
    const int lane = team.thread % 32, row = lane / 4, column = lane % 4;
    fold(ds, folded);
    skew(folded, row, column, x);
    sum_rows(row, column, x);
    const uint32_t own = team.shared + team.thread / 32 * (4 * PLACES);
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int m = 0; m < OWN; ++m) {
        const int place = 8 * (8 * m + row) + 2 * ((column - turn(row, e)) & 3) + e;
        if (8 * m + row < SKEWED) ptx::shared_store(own + 4 * place, x[2 * m + e]);
      }
    team.meet();
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int d = first + n * Team::THREADS;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < Team::WARPS; ++w) {
        const int place = team.thread + n * Team::THREADS - (Team::WARPS - 1 - w) * WARP_ROWS;
        if (0 <= place && place < PLACES) sum += ptx::shared_load_float(team.shared + 4 * (w * PLACES + place));
      }
      if (-t.radius < d && d < t.radius)
        t.middle[d] = before[n] + sum;
      else
        ends.add(d >= t.radius, sum);
    }
  }

  // The ends, after the last block of keys. The team has met since it was here last.
  DUPLEX_DEVICE static void finish(const Team& team, const DistanceTable& t, Ends& ends) {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2)
#pragma unroll
      for (float& sum : ends.sums) sum += ptx::shuffle_xor(sum, mask);
    if (team.thread % 32 == 0)
      for (int n = 0; n < 2; ++n) ptx::shared_store(team.shared + 4 * (team.thread / 32 * 2 + n), ends.sums[n]);
    ends = {};
    team.meet();
    if (team.thread > 0) return;
    for (int n = 0; n < 2; ++n) {
      float sum = 0;
      for (int w = 0; w < Team::WARPS; ++w) sum += ptx::shared_load_float(team.shared + 4 * (2 * w + n));
      t.middle[n == 0 ? -t.radius : t.radius] += sum;
    }
  }
};

// The tables of a slot, before anything is added.
DUPLEX_DEVICE void clear_slot(const DistanceSums& s, int slot, int thread) {
  float* to = s.slots + s.place(slot, 0);
  for (int64_t n = thread; n < s.heads * s.entries(); n += Team::THREADS) to[n] = 0;
}

DUPLEX_DEVICE DistanceTable table_of(const DistanceSums& s, int slot, int head) {
  return {s.slots + s.place(slot, head - s.first_head) + s.radius, s.radius};
}

}  // namespace duplex
