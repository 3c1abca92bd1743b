// The arguments of an attention operator made into a Problem.
#pragma once

#include "common/call_arguments.h"
#include "common/problem.h"

namespace duplex {

// Throws std::invalid_argument for a dtype the kernels do not take.
DType dtype_of(const Tensor& t);

// The fields of a Problem that make a score out of <q, k>; after its head_dim.
void set_scores(Problem& p, const OptionalTensor& bias, const OptionalTensor& distance_bias,
                const OptionalTensor& alibi_slopes, const OptionalTensor& row_distance_bias,
                const OptionalTensor& col_distance_bias, const OptionalTensor& sink, std::optional<double> scale,
                double softcap);

RowTable row_table(const OptionalTensor& t);

// out and lse may be freshly made (forward) or those of the forward call (backward).
Problem problem_of(const CallArguments& call, const Tensor& out, const Tensor& lse);

}  // namespace duplex
