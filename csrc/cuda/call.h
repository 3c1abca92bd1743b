// What the native operators share: a call of torch as plain data.
#pragma once

#include <optional>
#include <vector>

#include "common/call_arguments.h"
#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex {

// Throws std::invalid_argument unless it holds.
void expect(bool holds, const char* what);

DType dtype_of(const Tensor& t);    // float32, float16 or bfloat16, else it throws
bool is_bfloat16(const Tensor& t);  // else float16, else it throws

// Refuses what no kernel of the library takes.
void check_call(const CallArguments& call);

// Whether rows begin at multiples of `bytes`.
bool aligned(const Tensor& t, int64_t bytes);

// Whether bulk copies can read a tensor of 16-bit numbers or bytes: its first number and its strides are at multiples
// of 16 bytes.
bool has_bulk_rows(const Tensor& t);

// (head_dim, row, head, batch) of such a tensor, less the shape of the box. Of bytes, two are a number.
Box box_of(const Tensor& t, const Tensor& instead);

Rows rows_of(const Tensor& t);
Lengths lengths_of(const CallArguments& call);
int32_t bound_of(std::optional<int64_t> distance);  // of a window
Terms terms_of(int64_t head_dim, std::optional<double> scale, double softcap, const OptionalTensor& distance_bias,
               const OptionalTensor& alibi_slopes);

// Whether a score is more than a positive scale * <q, k>.
bool has_terms(const Terms& t);

// Of `heads`, how many a section has, so that what they read of `bytes` each stays in the cache; in whole groups.
int32_t section_of(int64_t heads, int64_t group, int64_t bytes);

}  // namespace duplex
