// Numbers in global memory as float32, one or 16 bytes of them at a time.
#pragma once

#include "cuda/ptx.cuh"

namespace duplex {

template <class T>
DUPLEX_DEVICE float widen(typename T::Stored x) {
  if constexpr (T::BITS == FLOAT32_BITS)
    return ptx::float_of(x);
  else if constexpr (T::BITS == BFLOAT16_BITS)
    return ptx::float_of(uint32_t(x) << 16);
  else
    return ptx::half_to_float(x);
}

template <class T>
DUPLEX_DEVICE typename T::Stored narrow(float x) {
  if constexpr (T::BITS == FLOAT32_BITS)
    return ptx::bits_of(x);
  else
    return uint16_t(ptx::pack<T>(x, 0));
}

// Numbers of a type in 16 bytes.
template <class T>
constexpr int VECTOR = 16 / sizeof(typename T::Stored);

template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) Vector {
  T number[COUNT];
};

// COUNT is 1, or VECTOR<T> where `from` lies on 16 bytes.
template <class T, int COUNT>
DUPLEX_DEVICE void load_vector(const typename T::Stored* from, float (&x)[COUNT]) {
  const auto read = *reinterpret_cast<const Vector<typename T::Stored, COUNT>*>(from);
#pragma unroll
  for (int n = 0; n < COUNT; ++n) x[n] = widen<T>(read.number[n]);
}

template <class T, int COUNT>
DUPLEX_DEVICE void store_vector(typename T::Stored* to, const float (&x)[COUNT]) {
  Vector<typename T::Stored, COUNT> written;
#pragma unroll
  for (int n = 0; n < COUNT; ++n) written.number[n] = narrow<T>(x[n]);
  *reinterpret_cast<Vector<typename T::Stored, COUNT>*>(to) = written;
}

}  // namespace duplex
