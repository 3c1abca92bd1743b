// A forward kernel as the host sees it.
#pragma once

#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex {

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

}  // namespace duplex
