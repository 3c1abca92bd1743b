// Hopper's kernels over pages as the host sees them.
#pragma once

#include "cuda/box.h"
#include "cuda/paged/call.h"

namespace duplex::sm90 {

struct PagedLaunch {
  paged::Call call;
  Box k, v;  // less the columns of the boxes; a box's rows are slots of a page
  bool bfloat16, terms;
  int processors;
  void* stream;
};

struct PagedVariant {
  int head_dim, block_m, block_n;
  int blocks;  // on a multiprocessor at once
  // Of `units`: tiles of the plan or pieces of the division.
  void (*launch)(const PagedLaunch& launch, paged::Which which, int32_t units);
};

// Tiles of 128 rows over pages of 16-bit numbers, and of 16 rows: the smallest that holds the head_dim. Throws
// std::invalid_argument beyond the largest.
const PagedVariant& paged_variant(int64_t head_dim);
const PagedVariant& decode_variant(int64_t head_dim, Storage storage);

}  // namespace duplex::sm90
