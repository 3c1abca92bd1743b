// The gradient of distance_bias on its way. Teams of warps sum it up, each in a slot of its own, a table for every head
// of a launch; then the slots are added. Who adds what when follows from the grid alone, so the result is
// deterministic.
#pragma once

#include <stdint.h>

#include "common/span.h"

namespace duplex {

// On Hopper two teams of the one block, on other cards one team of two blocks.
constexpr int SLOTS_A_PROCESSOR = 2;
// Of all slots, where one head needs no more: a call's heads are divided into launches that take turns in the same
// memory.
constexpr int64_t SLOT_BYTES = 32 << 20;

struct DistanceSums {
  float* slots;           // (slot, head of the launch, 2 * radius + 1); null where this gradient is not wanted
  int32_t count, radius;  // slots; a table's radius, at most the longest sequence: nothing is further away
  int32_t first_head, heads;

  DUPLEX_HOST_DEVICE int64_t entries() const { return 2 * int64_t(radius) + 1; }
  DUPLEX_HOST_DEVICE float* table(int32_t slot, int32_t head) const {
    return slots + (int64_t(slot) * heads + head) * entries();
  }
};

// Heads of one launch.
inline int64_t heads_at_once(int64_t heads, int64_t slots, int64_t entries) {
  const int64_t fit = SLOT_BYTES / (4 * (slots > 0 ? slots : 1) * entries);
  return fit < 1 ? 1 : fit < heads ? fit : heads;
}

}  // namespace duplex
