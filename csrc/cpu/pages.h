// Page tensors as the kernels take them, and the checks of what tables and lengths hold.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/call.h"
#include "cpu/kernels/kernels.h"

namespace duplex {

[[noreturn]] inline void wrong_value(const std::string& name, const std::string& expected, int64_t got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + std::to_string(got));
}

Pages pages_of(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
               const OptionalTensor& v_scales, const Tensor& block_table);

Rope rope_of(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved);

// cu holds count + 1 entries from 0 that never decrease, each step at most `longest`, the last at most `rows`.
void check_cu(const std::string& name, const int32_t* cu, int64_t count, int64_t rows, int64_t longest,
              const std::string& longest_name);

}  // namespace duplex
