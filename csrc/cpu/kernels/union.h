// Attention over several sets of keys, and a sink, from that over each: by the logarithms of their sums.
#pragma once

#include "cpu/kernels/vec.h"

namespace duplex::DUPLEX_ISA {

// Of parts with lse_of(0) to lse_of(count - 1): the log of the sum of all, and what each has of it. Parts that saw
// nothing have no share; one that is NaN makes all of it NaN.
template <class LseOf>
struct Union {
  const LseOf& lse_of;
  float reference, total = 0;

  Union(int count, const LseOf& lses, const float* sink) : lse_of(lses) {
    float top = sink ? *sink : -INF;
    for (int n = 0; n < count; ++n) top = lse_of(n) > top ? lse_of(n) : top;
    reference = top == -INF ? 0 : top;
    if (sink) total += __builtin_expf(*sink - reference);
    for (int n = 0; n < count; ++n) total += __builtin_expf(lse_of(n) - reference);
  }

  float lse() const { return total == 0 ? -INF : reference + __builtin_logf(total); }
  float share(int n) const { return total == 0 ? 0 : __builtin_expf(lse_of(n) - reference) / total; }
};

}  // namespace duplex::DUPLEX_ISA
