// The second implementation of csrc/cuda/device.cuh: a launch runs its blocks one after the other, in any order.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/box.h"
#include "cuda/ptx.cuh"
#include "cuda/stream.h"

namespace emulation {
extern uint64_t seed;         // of the next launch; each launch moves on
extern std::string launched;  // what was launched, a word each
extern int capability;        // of the card
}  // namespace emulation

namespace duplex {

inline ptx::TensorMap encode(const Box& box) {
  ptx::TensorMap map{static_cast<const char*>(box.data), {}, {}, box.columns, box.rows};
  std::copy(box.size, box.size + 4, map.size);
  std::copy(box.stride, box.stride + 4, map.stride);
  return map;
}

template <auto KERNEL, class... Arguments>
void launch(const char* what, int blocks, int threads, int shared_bytes, const Stream& stream,
            const Arguments&... arguments) {
  if (stream.ahead && emulation::capability != 90)
    throw std::runtime_error(std::string(what) + " is launched ahead on a card whose code does not wait");
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  const uint64_t seed = emulation::seed++;
  emulation::launched += std::string(what) + " ";
  const bool faulty = (what == std::string("schedule")) == emulation::fault.ranks;
  const emulation::Fault fault = faulty ? emulation::fault : emulation::Fault{};
  std::shuffle(order.begin(), order.end(), std::mt19937(uint32_t(seed)));
  for (int index : order) {
    emulation::Block block(index, blocks, threads, shared_bytes, seed, fault, stream.ahead);
    block.run([&] { KERNEL(arguments...); });
  }
}

}  // namespace duplex
