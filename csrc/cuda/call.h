// What the host's side of every operator needs of its tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tensors.h"
#include "cuda/arguments.h"

namespace duplex {

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("duplex_attn_cuda: ") + what);
}

inline int32_t device_index(const Tensor& t) {
  int32_t index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

// Contiguous, on the device of `on` and of its dtype, or float32, or int32.
inline Tensor new_tensor(const Tensor& on, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype = {}) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t type, own;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(on.get(), &own));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype.value_or(own), type, device_index(on), &handle));
  return Tensor(handle);
}
inline Tensor new_float(const Tensor& on, const std::vector<int64_t>& sizes) {
  return new_tensor(on, sizes, aoti_torch_dtype_float32());
}
inline Tensor new_int(const Tensor& on, const std::vector<int64_t>& sizes) {
  return new_tensor(on, sizes, aoti_torch_dtype_int32());
}

inline int64_t element_size(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

// Of the float types that the kernels take.
inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::FLOAT32;
    case ScalarType::Half: return DType::FLOAT16;
    case ScalarType::BFloat16: return DType::BFLOAT16;
    default: throw std::invalid_argument("duplex_attn_cuda: float32, float16 or bfloat16");
  }
}

// Else float16.
inline bool is_bfloat16(const Tensor& q) {
  using torch::headeronly::ScalarType;
  expect(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
         "q, k and v are bfloat16 or float16");
  return q.scalar_type() == ScalarType::BFloat16;
}

inline int32_t bound(std::optional<int64_t> distance) {
  return int32_t(std::clamp<int64_t>(distance.value_or(FAR), -FAR, FAR));
}

inline Terms terms_of(int64_t head_dim, std::optional<double> scale, double softcap,
                      const OptionalTensor& distance_bias, const OptionalTensor& alibi_slopes) {
  Terms t{};
  t.scale = float(scale ? *scale : 1.0 / std::sqrt(double(head_dim)));
  t.softcap = float(softcap);
  t.distance_bias = data<float>(distance_bias);
  t.radius = distance_bias ? int32_t(distance_bias->size(1) / 2) : 0;
  t.alibi_slopes = data<float>(alibi_slopes);
  return t;
}

}  // namespace duplex
