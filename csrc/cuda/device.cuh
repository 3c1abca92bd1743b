// The host's side of the hardware: tensor maps and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/box.h"
#include "cuda/device.h"
#include "cuda/ptx.cuh"

namespace duplex {

// Throws std::runtime_error where the driver refuses.
ptx::TensorMap encode(const Box& box);

template <auto KERNEL, class... Arguments>
void launch_as(bool ahead, const char* what, int blocks, int threads, int shared_bytes, void* stream,
               const Arguments&... arguments) {
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("duplex_attn_cuda: ") + what + " with " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(blocks);
  how.blockDim = dim3(threads);
  how.dynamicSmemBytes = size_t(shared_bytes);
  how.stream = static_cast<cudaStream_t>(stream);
  how.attrs = &early;
  how.numAttrs = ahead;
  check(cudaLaunchKernelEx(&how, KERNEL, arguments...));
}

template <auto KERNEL, class... Arguments>
void launch(const char* what, int blocks, int threads, int shared_bytes, void* stream, const Arguments&... arguments) {
  launch_as<KERNEL>(false, what, blocks, threads, shared_bytes, stream, arguments...);
}

// May begin before the launch before it has ended, where the card is Hopper's or later: every thread is to wait for
// that (ptx::wait_for_launch_before) before it reads what it wrote.
template <auto KERNEL, class... Arguments>
void launch_ahead(const char* what, int blocks, int threads, int shared_bytes, const Device& on,
                  const Arguments&... arguments) {
  launch_as<KERNEL>(on.capability >= 90, what, blocks, threads, shared_bytes, on.stream, arguments...);
}

}  // namespace duplex
