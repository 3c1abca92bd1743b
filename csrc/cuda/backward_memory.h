// What forward and backward hold at their peak, by sizes alone: in 16 bit at most 1.45 times q, k, v, out, lse and
// their gradients. Only float32 sums of dq can be more than that leaves: where many query heads share few keys, or
// sequences are short against the blocks of rows that sums lie in.
#pragma once

#include <stdint.h>

namespace duplex {

constexpr int64_t LITTLE = 2 << 20;  // bytes; torch's allocator takes as much from the card for the smallest tensor

struct BackwardMemory {
  int64_t tensors;    // bytes of q, k, v, out, lse and their gradients
  int64_t workspace;  // bytes of all else that backward allocates, less the order of tiles

  bool has_room_for(int64_t sums) const {
    const int64_t held = workspace + sums;
    return held <= LITTLE || 20 * held <= 9 * tensors;
  }
};

}  // namespace duplex
