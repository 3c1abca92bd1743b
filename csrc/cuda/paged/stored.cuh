// Bytes of quantised pages as pairs of float16 numbers, which hold them all exactly, ready for the tensor cores; and
// the powers of two that keep what is multiplied with them in float16's range.
#pragma once

#include "common/problem.h"
#include "cuda/ptx.cuh"

namespace duplex::paged {

template <Storage S>
constexpr int STORED_BYTES = S == Storage::AS_QUERIES ? 2 : 1;

// Two numbers of a word in a register: bytes 0 and STEP, and, with SECOND, the other two.
template <Storage S, int STEP, bool SECOND>
DUPLEX_DEVICE uint32_t widen_pair(uint32_t word) {
  constexpr int LOW = SECOND ? 3 - STEP : 0, HIGH = SECOND ? 3 : STEP;
  if constexpr (S == Storage::INT8) {
    // In the mantissa of 2^10, whose last bit is 1, with the sign made an offset of 128; -1152 in both halves.
    return ptx::add2(ptx::byte_permute(word ^ 0x80808080, 0x64646464, 0x4040 | LOW | HIGH << 8), 0xE480E480);
  } else {
    // Exponent and mantissa in their places; the exponent's bias is then 2^8 too large. NaN becomes 480.
    const uint32_t x = ptx::byte_permute(word, 0, 0x0404 | LOW << 4 | HIGH << 12);
    return ptx::multiply2((x & 0x80008000) | (x & 0x7F007F00) >> 1, 0x5C005C00);
  }
}

// All ones in the halves whose bytes are NaN: everything but the sign is set.
template <int STEP, bool SECOND>
DUPLEX_DEVICE uint32_t float8_nan(uint32_t word) {
  constexpr int LOW = SECOND ? 3 - STEP : 0, HIGH = SECOND ? 3 : STEP;
  const uint32_t x = ptx::byte_permute(word, 0, 0x0404 | LOW << 4 | HIGH << 12) & 0x7F007F00;
  const uint32_t nan = (x + 0x01000100) & 0x80008000;
  return (nan - (nan >> 15)) | nan;
}

// Each word as two pairs. CONVERTS: by the conversion that cards have from Ada on.
template <Storage S, bool CONVERTS, int STEP>
DUPLEX_DEVICE void widen_words(const uint32_t (&word)[4], uint32_t (&x)[4][2]) {
  if constexpr (S == Storage::FLOAT8_E4M3 && CONVERTS) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t pairs = STEP == 1 ? word[n] : ptx::byte_permute(word[n], 0, 0x3120);
      x[n][0] = ptx::float8_pair(uint16_t(pairs));
      x[n][1] = ptx::float8_pair(uint16_t(pairs >> 16));
    }
    return;
  }
  uint32_t sums = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    x[n][0] = widen_pair<S, STEP, false>(word[n]);
    x[n][1] = widen_pair<S, STEP, true>(word[n]);
    sums |= (word[n] & 0x7F7F7F7F) + 0x01010101;
  }
  if constexpr (S == Storage::FLOAT8_E4M3)
    if (sums & 0x80808080)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        x[n][0] |= float8_nan<STEP, false>(word[n]);
        x[n][1] |= float8_nan<STEP, true>(word[n]);
      }
}

// A power of two, as its bits: that of the largest of some numbers, whose bits these are, within [2^-126, 2^126].
constexpr uint32_t LEAST_UNIT = 1u << 23, ONE_UNIT = 127u << 23, LARGEST_UNIT = 253u << 23;
DUPLEX_DEVICE uint32_t unit_of(uint32_t largest) {
  const uint32_t power = largest & 0x7F800000;
  return power < LEAST_UNIT ? LEAST_UNIT : power > LARGEST_UNIT ? LARGEST_UNIT : power;
}
DUPLEX_DEVICE float inverse(uint32_t unit) { return ptx::float_of((254u << 23) - unit); }
DUPLEX_DEVICE uint32_t size_bits(float x) { return ptx::bits_of(x) & 0x7FFFFFFF; }

// Those of up to four rows, in one register.
struct RowUnits {
  uint32_t exponents = 0;

  DUPLEX_DEVICE void put(int r, float unit) { exponents |= ptx::bits_of(unit) >> 23 << 8 * r; }
  DUPLEX_DEVICE float of(int r) const { return ptx::float_of((exponents >> 8 * r & 0xFF) << 23); }
};

// The unit of a warp's values so far, which what they are worth is divided by.
struct ValueUnit {
  uint32_t unit = LEAST_UNIT;

  // `largest`: the bits of what the lane's values are worth at most. By what earlier sums shrink.
  DUPLEX_DEVICE float grow(uint32_t largest) {
    const uint32_t now = unit_of(ptx::reduce_max(largest)), before = unit;
    if (now <= before) return 1;
    unit = now;
    return ptx::float_of(before) * inverse(now);
  }
};

}  // namespace duplex::paged
