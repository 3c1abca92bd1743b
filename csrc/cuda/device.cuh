// The host's side of the hardware: tensor maps and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/box.h"
#include "cuda/ptx.cuh"

namespace duplex {

// Throws std::runtime_error where the driver refuses.
ptx::TensorMap encode(const Box& box);

template <auto KERNEL, class... Arguments>
void launch(const char* what, int blocks, int threads, int shared_bytes, void* stream, const Arguments&... arguments) {
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("duplex_attn_cuda: ") + what + " with " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  KERNEL<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace duplex
