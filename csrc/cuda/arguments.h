// What crosses into the forward kernels.
#pragma once

#include <stdint.h>

#include "cuda/lengths.h"
#include "cuda/schedule.h"

namespace duplex {

// What makes a score out of <q, k> (section 3 of the design); null where there is no such term.
struct Terms {
  float scale, softcap;
  const float* distance_bias;  // (heads_q, 2 * radius + 1)
  int32_t radius;
  const float* alibi_slopes;  // (heads_q,)
};

struct ForwardArguments {
  Lengths lengths;
  Terms terms;
  const float* sink;  // (heads_q,) or null
  int32_t heads_q, group, section, head_dim_v;
  Entries entries;
  const int32_t* order;  // how many entries there are, then those by rank

  void* out;  // 16-bit, (batch, row, head, head_dim_v) with strides in elements
  int64_t out_batch, out_row, out_head;
  float* lse;  // row stride 1
  int64_t lse_batch, lse_head;
};

}  // namespace duplex
