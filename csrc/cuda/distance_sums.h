// The gradient of distance_bias on its way. Teams of warps sum it up, each in a slot of its own, a table for every head
// of a launch; then the slots are added. Who adds what when follows from the grid alone, so the result is
// deterministic.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "common/span.h"

namespace duplex {

// On Hopper two teams of the one block, on other cards one team of two blocks.
constexpr int SLOTS_A_PROCESSOR = 2;
// All slots take at most this, or what one head of two slots a processor needs: heads are divided into launches that
// use the same slots in turn.
constexpr int64_t SLOT_BYTES = 32 << 20;
// And at most such a part of the call's tensors and their gradients.
constexpr int64_t SLOT_SHARE = 32;

struct DistanceSums {
  float* slots;               // (slot, head of the launch, 2 * radius + 1); null where this gradient is not wanted
  int32_t count, radius;      // slots; of their tables
  int32_t heads, first_head;  // of the launch

  DUPLEX_HOST_DEVICE int64_t entries() const { return 2 * int64_t(radius) + 1; }
  DUPLEX_HOST_DEVICE int64_t place(int32_t slot, int32_t head) const {
    return (int64_t(slot) * heads + head) * entries();
  }
};

// For so many tiles of rows of all heads, in `bytes` if one head leaves that. Nothing is further away than the longest
// sequence reaches, whatever the radius of the bias.
inline DistanceSums distance_sums(int64_t tiles, int32_t processors, int32_t heads, int32_t radius, int32_t longest,
                                  int64_t bytes) {
  DistanceSums s{nullptr, SLOTS_A_PROCESSOR * int32_t(std::min<int64_t>(tiles, processors)), std::min(radius, longest)};
  const int64_t fit = bytes / (4 * std::max(s.count, 1) * s.entries());
  s.heads = int32_t(std::clamp<int64_t>(fit, 1, std::max(heads, 1)));
  return s;
}

}  // namespace duplex
