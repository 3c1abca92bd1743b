// The host's side of the hardware: tensor maps and launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/box.h"
#include "cuda/ptx.cuh"
#include "cuda/stream.h"

namespace duplex {

// Throws std::runtime_error where the driver refuses.
ptx::TensorMap encode(const Box& box);

template <auto KERNEL, class... Arguments>
void launch(const char* what, int blocks, int threads, int shared_bytes, const Stream& stream,
            const Arguments&... arguments) {
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // told here, not once more by whoever asks next
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
  how.stream = static_cast<cudaStream_t>(stream.handle);
  how.attrs = &early;
  how.numAttrs = stream.ahead;
  check(cudaLaunchKernelEx(&how, KERNEL, arguments...));
}

}  // namespace duplex
