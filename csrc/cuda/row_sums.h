// What backward keeps of a row: the reference of its probabilities, its log-sum-exp in units of log2, and delta =
// rowsum(dout * out) - dlse. Each sequence has whole blocks of rows, whose rest has no weight: infinity and 0.
#pragma once

#include <stdint.h>

#include "cuda/lengths.h"

namespace duplex {

constexpr int32_t SUM_ROWS = 128;  // of a block; tiles of rows are that or divide it

struct RowSums {
  float *references, *deltas;  // (head, padded row)
  int64_t head;                // padded rows

  // Of row 0 of a sequence that is stored from `row` on. Sequences share no block, however short they are.
  DUPLEX_HOST_DEVICE static int64_t start(const Lengths& l, int b, int32_t row) {
    const int64_t dense = (int64_t(l.rows_q) + SUM_ROWS - 1) / SUM_ROWS * SUM_ROWS;
    return l.cu_q ? (row + int64_t(b) * SUM_ROWS) / SUM_ROWS * SUM_ROWS : b * dense;
  }

  // Padded rows of a head.
  static int64_t rows(const Lengths& l) { return start(l, l.batch, l.rows_q); }
};

}  // namespace duplex
