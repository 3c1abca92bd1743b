// Division by what is the same for a whole launch: a multiplication and a shift, where the hardware has no division.
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.)
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

// The logarithm of the least power of two that is no less.
inline int log2_above(int64_t count) {
  int log2 = 0;
  while (int64_t(1) << log2 < count) ++log2;
  return log2;
}

struct Divider {
  uint32_t divisor, factor;
  int32_t shift;

  // divisor: 1 to 2^31.
  static Divider of(int64_t divisor) {
    const int32_t shift = log2_above(divisor);
    const uint64_t rest = (uint64_t(1) << shift) - uint64_t(divisor);
    return {uint32_t(divisor), uint32_t((rest << 32) / uint64_t(divisor) + 1), shift};
  }

  // n / divisor, of n below 2^31.
  DUPLEX_HOST_DEVICE uint32_t quotient(uint32_t n) const { return (uint32_t(uint64_t(n) * factor >> 32) + n) >> shift; }

  struct Divided {
    int32_t quotient, rest;
  };
  DUPLEX_HOST_DEVICE Divided divide(int32_t n) const {
    const uint32_t whole = quotient(n);
    return {int32_t(whole), int32_t(n - whole * divisor)};
  }
  DUPLEX_HOST_DEVICE int32_t down(int32_t n) const { return int32_t(quotient(n) * divisor); }  // to a multiple
  DUPLEX_HOST_DEVICE int32_t up(int32_t n) const { return down(n + int32_t(divisor) - 1); }
};

}  // namespace duplex
