// Forward for every card from Ampere on (less Hopper, which has its own): all warps of a block load, multiply and
// weigh.
#pragma once

#include "cuda/sm80/compute.cuh"

namespace duplex::sm80 {

template <class T, class S, bool TERMS>
DUPLEX_KERNEL(S::THREADS)
forward_kernel(DUPLEX_PARAMETER ForwardArguments a, DUPLEX_PARAMETER Sources from) {
  Compute<T, S, TERMS>{a, from}.run();
}

}  // namespace duplex::sm80
