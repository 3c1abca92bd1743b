#pragma once

#include <tuple>

#include "cpu/call.h"

namespace duplex {

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS);

}  // namespace duplex
