// Which kernels a card runs, by its compute capability (of 9.0: 90). Hopper has its own, which no other card runs.
#pragma once

#include "cuda/launch.h"

namespace duplex {

const Variant& forward_variant(int64_t capability, int64_t head_dim);
const BackwardVariant& dq_variant(int64_t capability, int64_t head_dim);
const BackwardVariant& dkdv_variant(int64_t capability, int64_t head_dim);
// dq, dk and dv at once, by sums in no fixed order; null where there is no such kernel.
const BackwardVariant* fused_variant(int64_t capability, int64_t head_dim);

}  // namespace duplex
