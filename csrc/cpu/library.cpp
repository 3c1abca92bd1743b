// torch.ops.duplex_attn_cpu: the native operators behind duplex_attn's.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/paged.h"

STABLE_TORCH_LIBRARY(duplex_attn_cpu, m) {
  const std::string call = duplex::CALL_SCHEMA;
  m.def(("attention_forward(" + call + ") -> (Tensor, Tensor)").c_str());
  m.def(("attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, " + call +
         ", int output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seqlens_k, "
      "Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? prefix, SymInt? left, SymInt? right, bool top_left, "
      "Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, Tensor? row_distance_bias, "
      "Tensor? col_distance_bias, Tensor? sink, Tensor? k_scales, Tensor? v_scales, Tensor? rope_cos, "
      "Tensor? rope_sin, bool rope_interleaved, float? scale, float softcap, bool batch_invariant, Tensor? plan, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "paged_append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
      "Tensor positions, Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, "
      "Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> ()");
  m.def(
      "copy_pages(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor src, Tensor dst, Tensor(c!)? k_scales, "
      "Tensor(d!)? v_scales) -> ()");
  m.def(
      "plan(Tensor block_table, Tensor seqlens_k, Tensor? cu_seqlens_q, Tensor? prefix, int page_size, int? left, "
      "int? right, bool top_left, bool batch_invariant, int block_rows, int workers) -> Tensor");
  m.def(
      "check_plan(Tensor plan, Tensor block_table, Tensor seqlens_k, Tensor? cu_seqlens_q, Tensor? prefix, "
      "int page_size, int? left, int? right, bool top_left, bool batch_invariant) -> ()");
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
  m.impl("paged_attention", TORCH_BOX(&duplex::paged_attention));
  m.impl("paged_append", TORCH_BOX(&duplex::paged_append));
  m.impl("copy_pages", TORCH_BOX(&duplex::copy_pages));
  m.impl("plan", TORCH_BOX(&duplex::plan));
  m.impl("check_plan", TORCH_BOX(&duplex::check_plan));
}
