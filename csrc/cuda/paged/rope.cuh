// Rotary position embedding on the way in (Su et al., "RoFormer", 2021).
#pragma once

#include "common/problem.h"
#include "cuda/lengths.h"
#include "cuda/vector.cuh"

namespace duplex::paged {

DUPLEX_DEVICE void turn(float& first, float& second, float cos, float sin) {
  const float turned = first * cos - second * sin;
  second = second * cos + first * sin;
  first = turned;
}

// Numbers [column, column + COUNT) of a row, turned by its position and rounded as their type: as if they had been
// turned before. With COUNT > 1, no pair's halves and no end of the turning part lie inside such a run but where pairs
// are interleaved.
template <class T, int COUNT>
DUPLEX_DEVICE void load_rotated(const typename T::Stored* row, int column, int64_t position, const Rope& rope,
                                float (&x)[COUNT]) {
  load_vector<T>(row + column, x);
  const int reach = int(rope.reach);
  if (!rope || column >= 2 * reach) return;
  const int64_t last = rope.positions - 1, at = (position < 0 ? 0 : position > last ? last : position) * reach;
  float other[COUNT];
  if constexpr (COUNT > 1) {
    if (rope.interleaved) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n) other[n] = x[n ^ 1];
    } else {
      load_vector<T>(row + (column < reach ? column + reach : column - reach), other);
    }
  } else {
    load_vector<T>(row + (rope.interleaved ? column ^ 1 : column < reach ? column + reach : column - reach), other);
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const int c = column + n, pair = rope.interleaved ? c / 2 : c < reach ? c : c - reach;
    const bool first = rope.interleaved ? c % 2 == 0 : c < reach;
    const float turned = x[n] * rope.cos[at + pair] + (first ? -other[n] : other[n]) * rope.sin[at + pair];
    x[n] = widen<T>(narrow<T>(turned));
  }
}

// Eight numbers of a row from `column` on, so turned; those from `columns` on stay as they are. In one piece where rows
// begin and end on 16 bytes and so does what turns.
template <class T>
DUPLEX_DEVICE void load_eight(const typename T::Stored* row, int column, int columns, bool in_one, int64_t position,
                              const Rope& rope, float (&x)[8]) {
  if (column >= columns) return;
  if (in_one) return load_rotated<T>(row, column, position, rope, x);
  const int end = columns - column < 8 ? columns - column : 8;
#pragma unroll 1
  for (int n = 0; n < end; ++n) {  // hardly ever: little code rather than quick
    float one[1];
    load_rotated<T>(row, column + n, position, rope, one);
#pragma unroll
    for (int m = 0; m < 8; ++m) x[m] = m == n ? one[0] : x[m];
  }
}

}  // namespace duplex::paged
