// The forward kernels of Hopper as the host sees them: one row a head_dim.
#pragma once

#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex::sm90 {

struct ForwardLaunch {
  ForwardArguments arguments;
  Box q, k, v;    // less the shape of the boxes
  bool bfloat16;  // else float16
  bool terms;     // a score is more than a positive scale * <q, k>
  int processors;
  void* stream;
};

struct Variant {
  int head_dim, block_m, block_n;
  void (*launch)(ForwardLaunch&);
};

// The one for this head_dim: the smallest that holds it. Throws std::invalid_argument beyond the largest.
const Variant& variant(int64_t head_dim);

}  // namespace duplex::sm90
