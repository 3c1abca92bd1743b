// The kernels of the instruction set in use: the widest this CPU has, or the one DUPLEX_ATTN_ISA names.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace duplex {

struct Isa {
  const char* name;
  bool (*supported)();
  const ForwardKernel* forward;
  const BackwardKernel* backward;
  const BiasKernel* bias;
  const MergeKernel* merge;
  const DecodeKernel* decode;
  const PartsKernel* parts;
  const AppendKernel* append;
  const Isa* others = nullptr;  // for dtypes other than bfloat16; null: itself
};

// Those this CPU can run, narrowest first, less what emulates one.
std::vector<std::string> supported_isas();

// Reads DUPLEX_ATTN_ISA at every call. Throws std::invalid_argument for a name that is unknown or cannot run here.
const Isa& current_isa();

// That, or what it leaves tensors of this dtype to.
const Isa& isa_for(DType dtype);

}  // namespace duplex
