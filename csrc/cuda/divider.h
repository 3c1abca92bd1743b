// Division by what is the same for a whole launch: a multiplication and a shift, where the hardware has no division.
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.)
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

struct Divider {
  uint32_t divisor, factor;
  int32_t shift;

  // divisor: 1 to 2^31.
  static Divider of(int64_t divisor) {
    int32_t shift = 0;
    while (int64_t(1) << shift < divisor) ++shift;
    const uint64_t rest = (uint64_t(1) << shift) - uint64_t(divisor);
    return {uint32_t(divisor), uint32_t((rest << 32) / uint64_t(divisor) + 1), shift};
  }

  // n / divisor, of n below 2^31.
  DUPLEX_HOST_DEVICE uint32_t quotient(uint32_t n) const { return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift; }
};

}  // namespace duplex
