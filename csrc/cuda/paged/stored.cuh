// Bytes of quantised pages as pairs of 16-bit numbers, ready for the tensor cores.
#pragma once

#include "common/problem.h"
#include "cuda/ptx.cuh"

namespace duplex::paged {

template <Storage S>
constexpr int STORED_BYTES = S == Storage::AS_QUERIES ? 2 : 1;

// Bytes LOW and HIGH of a word as two numbers of T, in the lower and the upper half of a register.
template <class T, Storage S, int LOW, int HIGH>
DUPLEX_DEVICE uint32_t widen_pair(uint32_t word) {
  if constexpr (S == Storage::INT8) {
    // In the mantissa of 2^23, whose last bit is 1, with the sign made an offset of 128.
    constexpr float OFFSET = 8388608 + 128;
    const uint32_t shifted = word ^ 0x80808080;
    return ptx::pack<T>(ptx::float_of(ptx::byte_permute(shifted, 0x4B000000, 0x7540 + LOW)) - OFFSET,
                        ptx::float_of(ptx::byte_permute(shifted, 0x4B000000, 0x7540 + HIGH)) - OFFSET);
  } else {
    // Exponent and mantissa in their places; the exponent's bias is then 2^8 or 2^120 too large. NaN becomes 480.
    constexpr bool WIDE = T::BITS == BFLOAT16_BITS;
    const uint32_t x = ptx::byte_permute(word, 0, 0x0404 | LOW << 4 | HIGH << 12);
    const uint32_t number = (x & 0x80008000) | (x & 0x7F007F00) >> (WIDE ? 4 : 1);
    return ptx::multiply2<T>(number, WIDE ? 0x7B807B80 : 0x5C005C00);
  }
}

// All ones in the halves whose bytes are NaN: everything but the sign is set.
template <int LOW, int HIGH>
DUPLEX_DEVICE uint32_t float8_nan(uint32_t word) {
  const uint32_t x = ptx::byte_permute(word, 0, 0x0404 | LOW << 4 | HIGH << 12) & 0x7F007F00;
  const uint32_t nan = (x + 0x01000100) & 0x80008000;
  return (nan - (nan >> 15)) | nan;
}

// Each word as two pairs: of bytes 0 and STEP, and of the other two.
template <class T, Storage S, int STEP>
DUPLEX_DEVICE void widen_words(const uint32_t (&word)[4], uint32_t (&x)[4][2]) {
  constexpr int THIRD = 3 - STEP;
  uint32_t sums = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    x[n][0] = widen_pair<T, S, 0, STEP>(word[n]);
    x[n][1] = widen_pair<T, S, THIRD, 3>(word[n]);
    sums |= (word[n] & 0x7F7F7F7F) + 0x01010101;
  }
  if constexpr (S == Storage::FLOAT8_E4M3)
    if (sums & 0x80808080)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        x[n][0] |= float8_nan<0, STEP>(word[n]);
        x[n][1] |= float8_nan<THIRD, 3>(word[n]);
      }
}

}  // namespace duplex::paged
