// Where each sequence of a call lies, read on the device: contents are not trusted, so that no read passes a tensor.
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

constexpr int32_t FAR = 1 << 29;  // of a span; rows stay below it, so that positions and distances add up in 32 bits

struct Lengths {
  const int32_t *cu_q, *cu_k, *len_q, *len_k, *start_q, *start_k, *prefix;  // each may be null
  int32_t batch, rows_q, rows_k;  // rows as stored: of a padded row (dense) or of all sequences (packed)
  int32_t max_q, max_k;
  int32_t left, right;  // within [-FAR, FAR]
  bool top_left;
};

// Query i of the sequence is stored at row_q + i, key j at row_k + j.
struct Extent {
  int32_t row_q, len_q, row_k, len_k;
  Span span;
};

struct RowRange {
  int32_t row, length;
};

DUPLEX_HOST_DEVICE inline int32_t clamp32(int32_t x, int32_t low, int32_t high) {
  return x < low ? low : x > high ? high : x;
}

DUPLEX_HOST_DEVICE inline RowRange row_range(const int32_t* cu, const int32_t* lens, const int32_t* starts, int b,
                                             int32_t rows, int32_t most) {
  if (cu) {
    const int32_t row = clamp32(cu[b], 0, rows), left = rows - row;
    return {row, clamp32(cu[b + 1] - row, 0, most < left ? most : left)};
  }
  const int32_t row = starts ? clamp32(starts[b], 0, rows) : 0;
  return {row, lens ? clamp32(lens[b], 0, rows - row) : rows - row};
}

DUPLEX_HOST_DEVICE inline RowRange query_rows(const Lengths& l, int b) {
  return row_range(l.cu_q, l.len_q, l.start_q, b, l.rows_q, l.max_q);
}

DUPLEX_HOST_DEVICE inline RowRange key_rows(const Lengths& l, int b) {
  return row_range(l.cu_k, l.len_k, l.start_k, b, l.rows_k, l.max_k);
}

DUPLEX_HOST_DEVICE inline Extent extent(const Lengths& l, int b) {
  const RowRange q = query_rows(l, b), k = key_rows(l, b);
  const int32_t prefix = l.prefix ? clamp32(l.prefix[b], 0, k.length) : 0;
  return {q.row, q.length, k.row, k.length, {k.length, prefix, l.top_left ? 0 : k.length - q.length, l.left, l.right}};
}

}  // namespace duplex
