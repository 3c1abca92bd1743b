// Tensors of torch as the plain data of problem.h, and new ones.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/problem.h"

namespace duplex {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

inline View view(const Tensor& t) {
  const int64_t d = t.dim();
  return {t.data_ptr(), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

inline int32_t device_index(const Tensor& t) {
  int32_t index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &index));
  return index;
}

inline int32_t torch_dtype(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// Bytes of a number of any dtype.
inline int64_t element_size(const Tensor& t) { return int64_t(aoti_torch_dtype_element_size(torch_dtype(t))); }

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

inline Tensor new_of(int32_t dtype, const Tensor& on, const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  int32_t type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, type,
                                                  device_index(on), &handle));
  return Tensor(handle);
}

// Contiguous and uninitialised, on the device of `on`: of its dtype, of its shape too, float32, int32.
inline Tensor new_tensor(const Tensor& on, const Sizes& sizes) { return new_of(torch_dtype(on), on, sizes); }
inline Tensor new_like(const Tensor& t) { return new_tensor(t, sizes_of(t)); }
inline Tensor new_float(const Tensor& on, const Sizes& sizes) { return new_of(aoti_torch_dtype_float32(), on, sizes); }
inline Tensor new_int(const Tensor& on, const Sizes& sizes) { return new_of(aoti_torch_dtype_int32(), on, sizes); }

}  // namespace duplex
