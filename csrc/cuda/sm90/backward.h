// The backward kernels of Hopper as the host sees them: of each, one row a head_dim.
#pragma once

#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex::sm90 {

struct BackwardLaunch {
  BackwardArguments arguments;
  Box q, k, v, dout;  // less the shape of the boxes
  bool bfloat16;      // else float16
  bool terms;         // a score is more than a positive scale * <q, k>
  int processors;
  void* stream;
};

struct BackwardVariant {
  int head_dim, block_m, block_n;
  void (*launch)(BackwardLaunch&);
};

// The ones for this head_dim: the smallest that holds it. Throw std::invalid_argument beyond the largest.
const BackwardVariant& dq_variant(int64_t head_dim);
const BackwardVariant& dkdv_variant(int64_t head_dim);

}  // namespace duplex::sm90
