// Rows that a few lanes of a warp take, side by side, and the runs of numbers that one lane moves at a time.
#pragma once

#include <type_traits>

#include "cuda/divider.h"
#include "cuda/vector.cuh"

namespace duplex {

struct Lanes {  // 2^log2 of them
  int log2, thread;

  DUPLEX_DEVICE explicit Lanes(int log2) : log2(log2), thread(ptx::thread_index()) {}
  DUPLEX_DEVICE int width() const { return 1 << log2; }
  DUPLEX_DEVICE int lane() const { return thread & (width() - 1); }
  DUPLEX_DEVICE int row() const { return thread >> log2; }  // of the block's
  // What the n-th of them has.
  DUPLEX_DEVICE float of(float x, int n) const { return ptx::shuffle(x, (thread & 31 & -width()) + n); }
};

// A run as it lies in memory: one number, or 16 bytes of them where rows begin and end on 16 bytes.
template <class T, int COUNT>
using Run = std::conditional_t<COUNT == 1, typename T::Stored, Words4>;

template <class T, int COUNT>
DUPLEX_DEVICE Run<T, COUNT> load_run(const typename T::Stored* from) {
  return *reinterpret_cast<const Run<T, COUNT>*>(from);
}

template <class T, int COUNT>
DUPLEX_DEVICE void widen_run(const Run<T, COUNT>& run, float (&x)[COUNT]) {
  static_assert(COUNT == 1 || COUNT == VECTOR<T>);
  if constexpr (COUNT == 1) {
    x[0] = widen<T>(run);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if constexpr (COUNT == 4)
        x[n] = ptx::float_of(run.word[n]);
      else
        ptx::unpack<T>(run.word[n], x[2 * n], x[2 * n + 1]);
  }
}

// As many numbers of a table whose rows are runs.
template <int COUNT>
DUPLEX_DEVICE void load_floats(const float* from, float (&x)[COUNT]) {
  constexpr int WIDTH = COUNT > 1 ? 4 : 1;
#pragma unroll
  for (int n = 0; n < COUNT; n += WIDTH) {
    const auto run = load_run<Float32, WIDTH>(reinterpret_cast<const uint32_t*>(from + n));
    widen_run<Float32>(run, reinterpret_cast<float (&)[WIDTH]>(x[n]));
  }
}

template <class T, int COUNT>
DUPLEX_DEVICE Run<T, COUNT> narrow_run(const float (&x)[COUNT]) {
  static_assert(COUNT == 1 || COUNT == VECTOR<T>);
  if constexpr (COUNT == 1) {
    return narrow<T>(x[0]);
  } else {
    Words4 run;
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if constexpr (COUNT == 4)
        run.word[n] = ptx::bits_of(x[n]);
      else
        run.word[n] = ptx::pack<T>(x[2 * n], x[2 * n + 1]);
    return run;
  }
}

}  // namespace duplex
