// What a probe finds in shared memory.
#pragma once

#include "cuda/ptx.cuh"

namespace duplex::probes {

// Shared memory as given, less its first kilobyte, which is for barriers.
DUPLEX_DEVICE uint32_t write_image(const int* image, int words) {
  const uint32_t at = ptx::shared_base() + 1024;
  for (int n = ptx::thread_index(); n < words; n += 128) ptx::shared_store(at + 4 * n, image[n]);
  return at;
}

}  // namespace duplex::probes
