// torch.ops.duplex_attn_cuda: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/backward.h"
#include "cuda/device.h"
#include "cuda/forward.h"

STABLE_TORCH_LIBRARY(duplex_attn_cuda, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("forward_tile(int capability, int head_dim) -> str");
  m.def("runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_forward", TORCH_BOX(&duplex::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&duplex::attention_backward));
  m.impl("forward_tile", TORCH_BOX(&duplex::forward_tile));
  m.impl("runtime_version", TORCH_BOX(&duplex::runtime_version));
}
