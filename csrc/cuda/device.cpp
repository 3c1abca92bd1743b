#include "cuda/device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

namespace duplex {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("duplex_attn_cuda: ") + cudaGetErrorString(error));
}

int driver_version() {
  static const int version = [] {
    int found = 0;
    check(cudaDriverGetVersion(&found));
    return found;
  }();
  return version;
}

}  // namespace

int64_t runtime_version() { return CUDART_VERSION; }

Device::Device(int32_t index) : index_(index) {
  check(cudaGetDevice(&before_));
  if (before_ != index_) check(cudaSetDevice(index_));
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_));
  capability = 10 * major + minor;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index_));
  // Later cards run code for Ampere, in which nothing waits; older drivers cannot capture such launches.
  overlaps = capability == 90 && driver_version() >= 12030;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
}

Device::~Device() {
  if (before_ != index_) cudaSetDevice(before_);
}

}  // namespace duplex
