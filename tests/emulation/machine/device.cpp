// The emulated card, behind the same operators as the real one.
#include "cuda/device.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#include "block.h"

namespace emulation {
uint64_t seed = 0;
int processors = 2;
int capability = 90;
std::string launched;
}  // namespace emulation

namespace duplex {
int64_t runtime_version() { return 0; }
Device::Device(int32_t)
    : capability(emulation::capability), processors(emulation::processors), overlaps(capability == 90) {}
Device::~Device() = default;
}  // namespace duplex

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_set(uint64_t seed, int processors) {
  emulation::seed = seed;
  emulation::processors = processors;
}

// Since the last time that it was asked.
EXPORTED const char* emulation_launched() {
  static std::string told;
  told = std::move(emulation::launched);
  emulation::launched.clear();
  return told.c_str();
}

EXPORTED void emulation_card(int capability) { emulation::capability = capability; }

EXPORTED void emulation_leave_out(int kind, int number, bool ranks) {
  emulation::fault = {emulation::Fault::Kind(kind), number, ranks};
}
