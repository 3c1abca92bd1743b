// What the native operators share: a call of torch as plain data, and new tensors.
#pragma once

#include <vector>

#include "common/call_arguments.h"
#include "cuda/arguments.h"
#include "cuda/box.h"

namespace duplex {

// Throws std::invalid_argument unless it holds.
void expect(bool holds, const char* what);

// Contiguous, of a dtype as the shim numbers them, on the device of `on`.
Tensor new_tensor(const Tensor& on, const std::vector<int64_t>& sizes, int32_t dtype);
int32_t dtype_of(const Tensor& t);
int32_t device_index(const Tensor& t);

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Refuses what no kernel of the library takes.
void check_call(const CallArguments& call);

// Whether bulk copies can read a tensor: its first number and its strides are at multiples of 16 bytes.
bool has_bulk_rows(const Tensor& t);

// (head_dim, row, head, batch) of such a tensor, less the shape of the box.
Box box_of(const Tensor& t, const Tensor& instead);

Rows rows_of(const Tensor& t);
Lengths lengths_of(const CallArguments& call);
Terms terms_of(const CallArguments& call);

// Whether a score is more than a positive scale * <q, k>.
bool has_terms(const Terms& t);

// Of `heads`, how many a section has, so that what they read of `bytes` each stays in the cache; in whole groups.
int32_t section_of(int64_t heads, int64_t group, int64_t bytes);

}  // namespace duplex
