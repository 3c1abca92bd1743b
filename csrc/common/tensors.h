// Tensors of torch as the plain data of problem.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

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

}  // namespace duplex
