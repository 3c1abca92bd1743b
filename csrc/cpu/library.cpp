// torch.ops.duplex_attn_cpu: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(duplex_attn_cpu, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&duplex::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&duplex::attention_backward));
}
