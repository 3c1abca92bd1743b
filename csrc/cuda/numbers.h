// The types of numbers in memory, as tags: kernels move their bits and let the hardware do the arithmetic. And
// constants.
#pragma once

#include <stdint.h>

namespace duplex {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

constexpr int BFLOAT16_BITS = 0, FLOAT16_BITS = 1, FLOAT32_BITS = 2;

struct Bfloat16 {
  static constexpr int BITS = BFLOAT16_BITS;
  using Stored = uint16_t;
};
struct Float16 {
  static constexpr int BITS = FLOAT16_BITS;
  using Stored = uint16_t;
};
struct Float32 {
  static constexpr int BITS = FLOAT32_BITS;
  using Stored = uint32_t;
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

}  // namespace duplex
