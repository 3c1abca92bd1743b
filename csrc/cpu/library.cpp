// torch.ops.duplex_attn_cpu: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/merge.h"

STABLE_TORCH_LIBRARY(duplex_attn_cpu, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def("isa() -> str");
  m.def("isas() -> str[]");
}

namespace {
std::string isa() { return duplex::current_isa().name; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&duplex::supported_isas));
}

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&duplex::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&duplex::attention_backward));
  m.impl("merge_attention", TORCH_BOX(&duplex::merge_attention));
}
