// The two 16-bit types, as tags: kernels move their bits and let the hardware do the arithmetic. And constants.
#pragma once

#include <stdint.h>

namespace duplex {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

constexpr int BFLOAT16_BITS = 0, FLOAT16_BITS = 1;

struct Bfloat16 {
  static constexpr int BITS = BFLOAT16_BITS;
};
struct Float16 {
  static constexpr int BITS = FLOAT16_BITS;
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace duplex
