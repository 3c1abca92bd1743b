// Kernels as the host sees them: one row a head_dim.
#pragma once

#include <stdexcept>

#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex {

struct ForwardLaunch {
  ForwardArguments arguments;
  Box q, k, v;    // less the shape of the boxes
  bool bfloat16;  // else float16
  bool terms;     // a score is more than a positive scale * <q, k>
  bool ahead;     // another launch of this call comes before
  int processors;
  void* stream;
};

struct Variant {
  int head_dim, block_m, block_n;
  void (*launch)(ForwardLaunch&);
};

struct BackwardLaunch {
  BackwardArguments arguments;
  Box q, k, v, dout;  // less the shape of the boxes
  bool bfloat16;      // else float16
  bool terms;         // a score is more than a positive scale * <q, k>
  bool ahead;         // another launch of this call comes before
  int processors;
  void* stream;
};

struct BackwardVariant {
  int head_dim, block_m, block_n;
  void (*launch)(BackwardLaunch&);
};

// The first that holds the head_dim. Throws std::invalid_argument beyond the last.
template <class V, size_t COUNT>
const V& smallest(const V* const (&variants)[COUNT], int64_t head_dim) {
  for (const V* v : variants)
    if (head_dim <= v->head_dim) return *v;
  throw std::invalid_argument("the CUDA kernels take a head_dim of at most 256");
}

}  // namespace duplex
