// Exact unions of attentions over disjoint keys.
#pragma once

#include "common/problem.h"

namespace duplex {

constexpr int MERGE_PARTS = 32;  // of one call at most

struct MergePart {
  View out;  // (batch, row, head)
  const float* lse;
  int64_t lse_batch, lse_head, lse_row;
};

struct Merge {
  MergePart parts[MERGE_PARTS];
  int32_t count, heads, dim;
  int64_t batch, rows;
  DType dtype;
  void* out;   // contiguous (batch, row, head, dim)
  float* lse;  // contiguous (batch, head, row)
};

void merge(const Merge& m, void* stream);

}  // namespace duplex
