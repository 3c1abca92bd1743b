// What goes before a forward on any generation of cards.
#pragma once

#include "cuda/arguments.h"

namespace duplex {

// Ranks the entries of the call into `order`: their number, then the entries.
void schedule(const Lengths& lengths, const Entries& entries, int32_t* order, void* stream);

// Fills the rows that belong to no sequence.
void clear_outside(const ForwardArguments& arguments, int processors, void* stream);

}  // namespace duplex
