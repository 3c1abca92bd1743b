// Before the backward: what is kept of each row. Eight lanes take a row, a block SUM_ROWS of them.
#pragma once

#include <math.h>

#include "cuda/arguments.h"
#include "cuda/ptx.cuh"

namespace duplex {

constexpr int ROW_SUMS_THREADS = 256;

// Of a row's 8 columns from `column` on; what lies past the last is 0.
template <class T>
struct Eight {
  uint16_t word[8];

  DUPLEX_DEVICE Eight(const uint16_t* row, int column, int columns, bool whole) {
    if (whole) {
      const Words4 x = *reinterpret_cast<const Words4*>(row + column);
      for (int n = 0; n < 4; ++n) {
        word[2 * n] = uint16_t(x.word[n]);
        word[2 * n + 1] = uint16_t(x.word[n] >> 16);
      }
    } else {
      for (int n = 0; n < 8; ++n) word[n] = column + n < columns ? row[column + n] : uint16_t(0);
    }
  }
  DUPLEX_DEVICE uint32_t pair(int n) const { return uint32_t(word[2 * n]) | uint32_t(word[2 * n + 1]) << 16; }
};

template <class T>
DUPLEX_DEVICE float dot(const Eight<T>& a, const Eight<T>& b) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float a0, a1, b0, b1;
    ptx::unpack<T>(a.pair(n), a0, a1);
    ptx::unpack<T>(b.pair(n), b0, b1);
    sum = ptx::fma(a1, b1, ptx::fma(a0, b0, sum));
  }
  return sum;
}

// WHOLE: rows of both begin on 16 bytes and have whole eights.
template <class T, bool WHOLE>
DUPLEX_KERNEL(ROW_SUMS_THREADS)
row_sums_kernel(DUPLEX_PARAMETER RowSumsArguments a) {
  const Lengths& l = a.lengths;
  const int blocks = (l.max_q + SUM_ROWS - 1) / SUM_ROWS, part = ptx::thread_index() % 8;
  const int64_t tiles = int64_t(l.batch) * blocks * a.heads;
  for (int64_t tile = ptx::block_index(); tile < tiles; tile += ptx::blocks()) {
    const int head = int(tile % a.heads), block = int(tile / a.heads % blocks), b = int(tile / a.heads / blocks);
    const RowRange q = query_rows(l, b);
    const int i0 = block * SUM_ROWS;
    if (i0 >= q.length) continue;
    const int64_t at = head * a.sums.head + RowSums::start(l, b, q.row) + i0;
    for (int n = ptx::thread_index() / 8; n < SUM_ROWS; n += ROW_SUMS_THREADS / 8) {
      const bool live = i0 + n < q.length;
      const int64_t row = live ? q.row + i0 + n : q.row;
      float sum = 0;
      if (live) {
        const uint16_t *dout = a.dout.at(b, row, head), *out = a.out.at(b, row, head);
        uint16_t* copy = a.copy.data ? a.copy.at(b, row, head) : nullptr;
        for (int column = 8 * part; column < a.head_dim_v; column += 64) {
          const Eight<T> x(dout, column, a.head_dim_v, WHOLE), y(out, column, a.head_dim_v, WHOLE);
          sum += dot(x, y);
          if (copy) *reinterpret_cast<Words4*>(copy + column) = {x.pair(0), x.pair(1), x.pair(2), x.pair(3)};
        }
      }
      for (int mask = 1; mask < 8; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
      if (part != 0) continue;
      const int64_t stored = b * a.lse_batch + head * a.lse_head + row;
      const float lse = live ? a.lse[stored] : -INFINITY;
      const bool seen = lse > -INFINITY;
      a.sums.references[at + n] = seen ? lse * LOG2E : INFINITY;
      a.sums.deltas[at + n] = seen ? sum - (a.dlse ? a.dlse[stored] : 0.f) : 0.f;
    }
  }
}

}  // namespace duplex
