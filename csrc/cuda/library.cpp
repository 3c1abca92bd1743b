// torch.ops.duplex_attn_cuda: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/device.h"
#include "cuda/operators.h"

STABLE_TORCH_LIBRARY(duplex_attn_cuda, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(duplex::PAGED_ATTENTION_SCHEMA);
  m.def(duplex::PAGED_APPEND_SCHEMA);
  m.def(duplex::COPY_PAGES_SCHEMA);
  m.def("paged_workers(int device, int heads_kv) -> (int, int)");
  m.def("forward_tile(int capability, int head_dim) -> str");
  m.def("runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_forward", TORCH_BOX(&duplex::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&duplex::attention_backward));
  m.impl("merge_attention", TORCH_BOX(&duplex::merge_attention));
  m.impl("paged_attention", TORCH_BOX(&duplex::paged_attention));
  m.impl("paged_append", TORCH_BOX(&duplex::paged_append));
  m.impl("copy_pages", TORCH_BOX(&duplex::copy_pages));
  m.impl("paged_workers", TORCH_BOX(&duplex::paged_workers));
  m.impl("forward_tile", TORCH_BOX(&duplex::forward_tile));
  m.impl("runtime_version", TORCH_BOX(&duplex::runtime_version));
}
