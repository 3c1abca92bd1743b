#pragma once

#include <tuple>
#include <vector>

#include "cpu/call.h"

namespace duplex {

// outs: (..., heads, dim) alike in shape; lses: (batch, heads, rows) beside dense, (heads, rows) beside packed ones.
std::tuple<Tensor, Tensor> merge_attention(std::vector<Tensor> outs, std::vector<Tensor> lses);

}  // namespace duplex
