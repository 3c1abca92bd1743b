// The kernels of every card from Ampere on: for each head_dim the smallest that holds it. Throws std::invalid_argument
// beyond the largest.
#pragma once

#include "cuda/launch.h"

namespace duplex::sm80 {

const Variant& forward_variant(int64_t head_dim);
const BackwardVariant& dq_variant(int64_t head_dim);
const BackwardVariant& dkdv_variant(int64_t head_dim);

}  // namespace duplex::sm80
