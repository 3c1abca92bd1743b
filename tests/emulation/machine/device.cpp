// The emulated card, behind the same operators as the real one.
#include "cuda/device.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "block.h"

namespace emulation {
uint64_t seed = 0;
int processors = 2;
int capability = 90;
}  // namespace emulation

namespace duplex {
int64_t runtime_version() { return 0; }
Device::Device(int32_t) : capability(emulation::capability), processors(emulation::processors) {}
Device::~Device() = default;
}  // namespace duplex

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_set(uint64_t seed, int processors) {
  emulation::seed = seed;
  emulation::processors = processors;
}

EXPORTED void emulation_card(int capability) { emulation::capability = capability; }

EXPORTED void emulation_leave_out(int kind, int number) { emulation::fault = {emulation::Fault::Kind(kind), number}; }
