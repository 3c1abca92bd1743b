// The paged attention kernels as the host sees them.
#pragma once

#include "cuda/device.h"
#include "cuda/paged/call.h"

namespace duplex::paged {

struct Attention {
  int head_dim;
  // Of `units`: tiles of the plan or pieces of the division.
  void (*attend)(const Call& call, bool bfloat16, int tile_rows, Which which, int32_t units, void* stream);
  int (*block_n)(Storage storage, int tile_rows);
};

// The one for this head_dim: the smallest that holds it. Throws std::invalid_argument beyond the largest.
const Attention& attention(int64_t head_dim);

// Joins the parts of rows that have some; of so many units, merges of the plan or blocks of rows. The launch before it
// is the one that made them, not made ahead: lengths and plan are read before that has ended.
void merge_parts(const Call& call, bool bfloat16, int32_t units, const Device& device);

}  // namespace duplex::paged
