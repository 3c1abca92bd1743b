// The operators; schemas as in duplex_attn, less the backend's name.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/call_arguments.h"
#include "common/paged_arguments.h"

namespace duplex {

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS);

// Bit n of output_mask says whether the n-th of (dq, dk, dv, dbias, ddistance_bias, drow_distance_bias,
// dcol_distance_bias, dsink) is wanted; the others are empty. It has those of q, k, v, distance_bias
// and sink.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients attention_backward(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, DUPLEX_CALL_PARAMETERS,
                             int64_t output_mask);

// What a call of this head_dim (the larger of the two) is cut into on a card of this compute capability (of 9.0: 90).
std::string forward_tile(int64_t capability, int64_t head_dim);

std::tuple<Tensor, Tensor> merge_attention(std::vector<Tensor> outs, std::vector<Tensor> lses);

void paged_attention(DUPLEX_PAGED_PARAMETERS);

void paged_append(DUPLEX_APPEND_PARAMETERS);

void copy_pages(Tensor k_pages, Tensor v_pages, Tensor src, Tensor dst, OptionalTensor k_scales,
                OptionalTensor v_scales);

// Rows of a plan's tiles, and how many tiles run at once, each for every kv head.
std::tuple<int64_t, int64_t> paged_workers(int64_t device, int64_t heads_kv);

}  // namespace duplex
