// The emulated card, behind the same operators as the real one.
#include "cuda/device.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace emulation {
uint64_t seed = 0;
int processors = 2;
}  // namespace emulation

namespace duplex {
int64_t runtime_version() { return 0; }
Device::Device(int32_t) : processors(emulation::processors) {}
Device::~Device() = default;
}  // namespace duplex

extern "C" __attribute__((visibility("default"))) void emulation_set(uint64_t seed, int processors) {
  emulation::seed = seed;
  emulation::processors = processors;
}
