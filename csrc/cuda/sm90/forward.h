// The forward kernels of Hopper: one row a head_dim.
#pragma once

#include "cuda/launch.h"

namespace duplex::sm90 {

// The one for this head_dim: the smallest that holds it. Throws std::invalid_argument beyond the largest.
const Variant& variant(int64_t head_dim);

}  // namespace duplex::sm90
