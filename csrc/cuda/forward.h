#pragma once

#include <string>
#include <tuple>

#include "common/call_arguments.h"

namespace duplex {

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS);

// What a call of this head_dim (the larger of the two) is cut into on a card of this compute capability (of 9.0: 90).
std::string forward_tile(int64_t capability, int64_t head_dim);

}  // namespace duplex
