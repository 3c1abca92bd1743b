// Biases with a row of distances for each query, or each key (problem.h's RowTable): read and written in runs of
// distances, which are what a tile of scores has of a row.
#pragma once

#include "common/problem.h"
#include "cpu/kernels/pack.h"

namespace duplex::DUPLEX_ISA {

// Of `count` distances from `nearest` on: [0, low) take the row's first entry, [high, count) its last, and [low, high),
// which are the only ones of their entries, those between. A row with one entry gives it to both ends.
struct Run {
  int64_t first;  // the entry of distance `low`
  int low, high, count;

  Run(int64_t radius, int64_t nearest, int count)
      : low(int(clamp(1 - radius - nearest, 0, count))), high(int(clamp(radius - nearest, low, count))), count(count) {
    first = nearest + low + radius;
  }
};

// to[x] += what the table has for distance nearest + x in a row that begins at `row`.
template <class E>
inline void add_distances(float* to, const RowTable& table, const E* row, int64_t nearest, int count) {
  const Run run(table.radius, nearest, count);
  const auto entry_at = [&](int64_t entry) {
    alignas(64) float wide[LANES];
    store(wide, widen_partial(row + entry * table.entry, 1));
    return wide[0];
  };
  if (run.low > 0) {
    const float before = entry_at(0);
    for (int x = 0; x < run.low; ++x) to[x] += before;
  }
  int x = run.low;
  if (table.entry == 1) {
    const E* from = row + run.first - run.low;
    for (; x + LANES <= run.high; x += LANES) store(to + x, load<vfloat>(to + x) + widen(from + x));
  }
  for (; x < run.high; ++x) to[x] += entry_at(run.first + x - run.low);
  if (run.high < count) {
    const float after = entry_at(2 * table.radius);
    for (x = run.high; x < count; ++x) to[x] += after;
  }
}

// The way back, into a table with contiguous rows: the gradients of `count` scores go to their entries; those of the
// first and the last entry, which take many scores of a row, to ends[0] and ends[1].
template <class E>
inline void write_distances(const float* from, const RowTable& table, E* row, int64_t nearest, int count, float* ends) {
  const Run run(table.radius, nearest, count);
  for (int x = 0; x < run.low; ++x) ends[0] += from[x];
  for (int x = run.high; x < count; ++x) ends[1] += from[x];
  int x = run.low;
  E* to = row + run.first - run.low;
  for (; x + LANES <= run.high; x += LANES) narrow(to + x, load<vfloat>(from + x));
  if (x < run.high) {
    alignas(64) float last[LANES] = {};
    memcpy(last, from + x, (run.high - x) * sizeof(float));
    narrow_partial(to + x, load<vfloat>(last), run.high - x);
  }
}

template <class E>
inline void write_ends(const RowTable& table, E* row, const float* ends) {
  const bool one_entry = table.radius == 0;
  narrow_partial(row, splat(one_entry ? ends[0] + ends[1] : ends[0]), 1);
  if (!one_entry) narrow_partial(row + 2 * table.radius, splat(ends[1]), 1);
}

// Calls `f` with the first entry of a row.
template <class F>
inline void with_row(const RowTable& table, int64_t b, int64_t h, int64_t row, const F& f) {
  const int64_t at = b * table.batch + h * table.head + row * table.row;
  switch (table.dtype) {
    case DType::FLOAT32: return f((float*)table.data + at);
    case DType::FLOAT16: return f((f16*)table.data + at);
    case DType::BFLOAT16: return f((bf16*)table.data + at);
    case DType::BOOL: return;
  }
}

}  // namespace duplex::DUPLEX_ISA
