// What goes before and after the large kernels on any generation of cards.
#pragma once

#include "cuda/arguments.h"

namespace duplex {

// Ranks the entries of the call into `order`.
void schedule(const Lengths& lengths, const Entries& entries, Order order, void* stream);

// Fills the rows that belong to no sequence.
void clear_outside(const OutsideArguments& arguments, int processors, void* stream);

// What backward keeps of each row. `whole`: rows of dout and out begin on 16 bytes and have whole eights of columns.
void sum_rows(const RowSumsArguments& arguments, bool bfloat16, bool whole, int processors, void* stream);

// The gradient of distance_bias for the heads of a launch from their slots, to (heads, 2 * radius + 1).
void add_distances(const DistanceSums& sums, float* to, int32_t radius, void* stream);

void sink_gradient(const SinkArguments& arguments, int heads, void* stream);

}  // namespace duplex
