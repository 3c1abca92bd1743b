// torch.ops.duplex_attn_cpu: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/paged.h"
#include "cpu/parallel.h"

STABLE_TORCH_LIBRARY(duplex_attn_cpu, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(duplex::PAGED_ATTENTION_SCHEMA);
  m.def(duplex::PAGED_APPEND_SCHEMA);
  m.def(duplex::COPY_PAGES_SCHEMA);
  m.def(
      "plan(Tensor block_table, Tensor seqlens_k, Tensor? cu_seqlens_q, Tensor? prefix, int page_size, int? left, "
      "int? right, bool top_left, bool batch_invariant, int block_rows, int workers) -> Tensor");
  m.def(
      "check_plan(Tensor plan, Tensor block_table, Tensor seqlens_k, Tensor? cu_seqlens_q, Tensor? prefix, "
      "int page_size, int? left, int? right, bool top_left, bool batch_invariant) -> ()");
  m.def("isa(bool bfloat16) -> str");  // what such tensors are multiplied by, or others
  m.def("isas() -> str[]");
  m.def("fill_scratch_with_nan(bool on) -> ()");
}

namespace {
std::string isa(bool bfloat16) {
  return duplex::isa_for(bfloat16 ? duplex::DType::BFLOAT16 : duplex::DType::FLOAT32).name;
}
void fill_scratch_with_nan(bool on) { duplex::scratch_is_nan = on; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&duplex::supported_isas));
  m.impl("fill_scratch_with_nan", TORCH_BOX(&fill_scratch_with_nan));
}

STABLE_TORCH_LIBRARY_IMPL(duplex_attn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&duplex::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&duplex::attention_backward));
  m.impl("merge_attention", TORCH_BOX(&duplex::merge_attention));
  m.impl("paged_attention", TORCH_BOX(&duplex::paged_attention));
  m.impl("paged_append", TORCH_BOX(&duplex::paged_append));
  m.impl("copy_pages", TORCH_BOX(&duplex::copy_pages));
  m.impl("plan", TORCH_BOX(&duplex::plan));
  m.impl("check_plan", TORCH_BOX(&duplex::check_plan));
}
