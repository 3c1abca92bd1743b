// Tensor maps by the driver's encoder, which is found through the runtime: nothing links to libcuda.
#include <cuda.h>

#include "cuda/device.cuh"

namespace duplex {
namespace {

decltype(&cuTensorMapEncodeTiled) encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
    throw std::runtime_error("duplex_attn_cuda: the driver has no cuTensorMapEncodeTiled, it is older than CUDA 12.0");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

}  // namespace

ptx::TensorMap encode(const Box& box) {
  static const auto encode_tiled = encoder();
  static_assert(sizeof(CUtensorMap) == sizeof(ptx::TensorMap));
  const cuuint64_t size[4] = {cuuint64_t(box.size[0]), cuuint64_t(box.size[1]), cuuint64_t(box.size[2]),
                              cuuint64_t(box.size[3])};
  const cuuint64_t stride[3] = {cuuint64_t(box.stride[1]), cuuint64_t(box.stride[2]), cuuint64_t(box.stride[3])};
  const cuuint32_t extent[4] = {cuuint32_t(box.columns), cuuint32_t(box.rows), 1, 1}, step[4] = {1, 1, 1, 1};
  CUtensorMap map;
  // Either 16-bit type: bits are copied, and what lies outside becomes 0.
  const CUresult result = encode_tiled(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(box.data), size,
                                       stride, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       box.columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("duplex_attn_cuda: the driver refuses a tensor map, error " + std::to_string(result));
  ptx::TensorMap opaque;
  memcpy(&opaque, &map, sizeof map);
  return opaque;
}

}  // namespace duplex
