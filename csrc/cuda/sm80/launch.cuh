// What the launches of all kernels share.
#pragma once

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/sm80/load.cuh"

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)

namespace duplex::sm80 {

// Hardware hands blocks to multiprocessors as they become free; beyond so many, blocks walk over tiles.
constexpr int BLOCKS_A_PROCESSOR = 8;

inline int blocks_of(int64_t tiles, int processors) {
  return int(std::min<int64_t>(tiles, int64_t(processors) * BLOCKS_A_PROCESSOR));
}

inline Source source_of(const Box& box) {
  return {static_cast<const char*>(box.data), box.stride[1], box.stride[2], box.stride[3], int32_t(2 * box.size[0])};
}

}  // namespace duplex::sm80
