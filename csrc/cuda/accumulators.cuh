// Accumulators of a product as the left operand of the next.
#pragma once

#include "cuda/ptx.cuh"

namespace duplex {

template <class T, int COUNT, int STEPS>
DUPLEX_DEVICE void pack_operand(const float (&x)[COUNT], uint32_t (&a)[STEPS][4]) {
  static_assert(8 * STEPS == COUNT);
#pragma unroll
  for (int n = 0; n < COUNT / 2; ++n) a[n / 4][n % 4] = ptx::pack<T>(x[2 * n], x[2 * n + 1]);
}

}  // namespace duplex
