// The kernels of Hopper: for each head_dim the smallest that holds it. Throws std::invalid_argument beyond the largest.
#pragma once

#include "cuda/launch.h"

namespace duplex::sm90 {

const Variant& forward_variant(int64_t head_dim);
const BackwardVariant& dq_variant(int64_t head_dim);
const BackwardVariant& dkdv_variant(int64_t head_dim);
const BackwardVariant* fused_variant(int64_t head_dim);  // null where there is none

}  // namespace duplex::sm90
