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
    // Exponent and mantissa in their places; the exponent's bias is then 2^8 or 2^120 too large. NaN is all ones.
    constexpr bool WIDE = T::BITS == BFLOAT16_BITS;
    const uint32_t x = ptx::byte_permute(word, 0, 0x0404 | LOW << 4 | HIGH << 12);
    const uint32_t number = (x & 0x80008000) | (x & 0x7F007F00) >> (WIDE ? 4 : 1);
    const uint32_t nan = ((x & 0x7F007F00) + 0x01000100) & 0x80008000;
    return ptx::multiply2<T>(number, WIDE ? 0x7B807B80 : 0x5C005C00) | (nan - (nan >> 15)) | nan;
  }
}

}  // namespace duplex::paged
