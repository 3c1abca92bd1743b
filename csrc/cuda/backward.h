#pragma once

#include <tuple>

#include "common/call_arguments.h"

namespace duplex {

// Bit n of output_mask says whether the n-th of (dq, dk, dv, dbias, ddistance_bias, drow_distance_bias,
// dcol_distance_bias, dsink) is wanted; the others are empty. Those in between are refused.
typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> GradientTensors;
GradientTensors attention_backward(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, DUPLEX_CALL_PARAMETERS,
                                   int64_t output_mask);

}  // namespace duplex
