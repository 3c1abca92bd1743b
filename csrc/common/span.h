// Which keys a query sees: the one definition shared by every native kernel.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DUPLEX_HOST_DEVICE __host__ __device__
#else
#define DUPLEX_HOST_DEVICE
#endif

namespace duplex {

constexpr int64_t UNBOUNDED = int64_t(1) << 40;

enum class Cover { NONE, SOME, ALL };

// Query i stands at p = i + offset and sees key j of [0, len_k) when j < prefix or p - left <= j <= p + right.
struct Span {
  int64_t len_k;
  int64_t prefix;  // already clamped to [0, len_k]
  int64_t offset;
  int64_t left;
  int64_t right;

  DUPLEX_HOST_DEVICE int64_t first(int64_t i) const { return i + offset - left; }
  DUPLEX_HOST_DEVICE int64_t last(int64_t i) const { return i + offset + right; }

  DUPLEX_HOST_DEVICE bool sees(int64_t i, int64_t j) const {
    return j < len_k && (j < prefix || (first(i) <= j && j <= last(i)));
  }

  // How rows [i0, i1) see keys [j0, j1); both ranges hold at least one element.
  DUPLEX_HOST_DEVICE Cover cover(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    const bool window_misses = last(i1 - 1) < j0 || first(i0) > j1 - 1 || right + left < 0;
    if (j0 >= len_k || (j0 >= prefix && window_misses)) return Cover::NONE;
    if (j1 > len_k) return Cover::SOME;
    if (j1 <= prefix) return Cover::ALL;
    const int64_t must_start = j0 < prefix ? prefix : j0;  // the part the prefix leaves to the window
    return first(i1 - 1) <= must_start && j1 - 1 <= last(i0) ? Cover::ALL : Cover::SOME;
  }

  // Of the keys from `from` on, which some row of [i0, i1) may see, where the first run without a gap ends.
  DUPLEX_HOST_DEVICE int64_t run_end(int64_t i0, int64_t i1, int64_t from) const {
    const int64_t begin = first(i0), window_end = last(i1 - 1) + 1;
    const int64_t end = from >= prefix || begin <= prefix ? (window_end < prefix ? prefix : window_end) : prefix;
    return end < len_k ? end : len_k;
  }

  // The smallest j >= from that some row of [i0, i1) may see, or len_k.
  DUPLEX_HOST_DEVICE int64_t next(int64_t i0, int64_t i1, int64_t from) const {
    if (from < prefix) return from;
    const int64_t start = from < first(i0) ? first(i0) : from;
    return start > last(i1 - 1) || start > len_k ? len_k : start;
  }
};

}  // namespace duplex
