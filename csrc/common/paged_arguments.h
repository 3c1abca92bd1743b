// The arguments of the paged operators, as torch hands them over to every native library.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/tensors.h"

namespace duplex {

struct PagedArguments {
  Tensor q, k_pages, v_pages, block_table, seqlens_k;
  OptionalTensor cu_seqlens_q;
  int64_t max_seqlen_q;
  OptionalTensor prefix;
  std::optional<int64_t> left, right;
  bool top_left;
  OptionalTensor bias, distance_bias, alibi_slopes, row_distance_bias, col_distance_bias, sink, k_scales, v_scales,
      rope_cos, rope_sin;
  bool rope_interleaved;
  std::optional<double> scale;
  double softcap;
  bool batch_invariant;
  OptionalTensor plan;
  Tensor out, lse;
};

inline constexpr char PAGED_ATTENTION_SCHEMA[] =
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seqlens_k, "
    "Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? prefix, SymInt? left, SymInt? right, bool top_left, "
    "Tensor? bias, Tensor? distance_bias, Tensor? alibi_slopes, Tensor? row_distance_bias, "
    "Tensor? col_distance_bias, Tensor? sink, Tensor? k_scales, Tensor? v_scales, Tensor? rope_cos, "
    "Tensor? rope_sin, bool rope_interleaved, float? scale, float softcap, bool batch_invariant, Tensor? plan, "
    "Tensor(a!) out, Tensor(b!) lse) -> ()";
inline constexpr char PAGED_APPEND_SCHEMA[] =
    "paged_append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, "
    "Tensor positions, Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, "
    "Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> ()";
inline constexpr char COPY_PAGES_SCHEMA[] =
    "copy_pages(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor src, Tensor dst, Tensor(c!)? k_scales, "
    "Tensor(d!)? v_scales) -> ()";

#define DUPLEX_PAGED_PARAMETERS                                                                                      \
  Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seqlens_k, OptionalTensor cu_seqlens_q,       \
      int64_t max_seqlen_q, OptionalTensor prefix, std::optional<int64_t> left, std::optional<int64_t> right,        \
      bool top_left, OptionalTensor bias, OptionalTensor distance_bias, OptionalTensor alibi_slopes,                 \
      OptionalTensor row_distance_bias, OptionalTensor col_distance_bias, OptionalTensor sink,                       \
      OptionalTensor k_scales, OptionalTensor v_scales, OptionalTensor rope_cos, OptionalTensor rope_sin,            \
      bool rope_interleaved, std::optional<double> scale, double softcap, bool batch_invariant, OptionalTensor plan, \
      Tensor out, Tensor lse
#define DUPLEX_PAGED_ARGUMENTS \
  {                            \
      q,                       \
      k_pages,                 \
      v_pages,                 \
      block_table,             \
      seqlens_k,               \
      cu_seqlens_q,            \
      max_seqlen_q,            \
      prefix,                  \
      left,                    \
      right,                   \
      top_left,                \
      bias,                    \
      distance_bias,           \
      alibi_slopes,            \
      row_distance_bias,       \
      col_distance_bias,       \
      sink,                    \
      k_scales,                \
      v_scales,                \
      rope_cos,                \
      rope_sin,                \
      rope_interleaved,        \
      scale,                   \
      softcap,                 \
      batch_invariant,         \
      plan,                    \
      out,                     \
      lse}
#define DUPLEX_APPEND_PARAMETERS                                                                                       \
  Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor positions, OptionalTensor cu_seqlens, \
      OptionalTensor rope_cos, OptionalTensor rope_sin, bool rope_interleaved, OptionalTensor k_scales,                \
      OptionalTensor v_scales

// A block table with contiguous rows, as the kernels read it.
inline Tensor table_of(const Tensor& block_table) {
  return block_table.stride(1) != 1 && block_table.size(1) > 1 ? torch::stable::contiguous(block_table) : block_table;
}

// `block_table` with contiguous rows.
inline Pages pages_of(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                      const OptionalTensor& v_scales, const Tensor& block_table) {
  using torch::headeronly::ScalarType;
  const auto scale_view = [](const OptionalTensor& t) -> ScaleView {
    if (!t) return {};
    const auto stride = [&](int d) { return t->size(d) == 1 ? 0 : t->stride(d); };
    return {data<float>(t), stride(0), stride(1), stride(2)};
  };
  const ScalarType type = k_pages.scalar_type();
  Pages p{};
  p.k = view(k_pages);
  p.v = view(v_pages);
  p.k_scales = scale_view(k_scales);
  p.v_scales = scale_view(v_scales);
  p.storage = type == ScalarType::Char            ? Storage::INT8
              : type == ScalarType::Float8_e4m3fn ? Storage::FLOAT8_E4M3
                                                  : Storage::AS_QUERIES;
  p.table = static_cast<const int32_t*>(block_table.const_data_ptr());
  p.table_row = block_table.stride(0);
  p.page_size = k_pages.size(1);
  return p;
}

inline Rope rope_of(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  if (!cos || cos->size(0) == 0) return {};
  return {data<float>(cos), data<float>(sin), cos->size(0), cos->size(1), interleaved};
}

// Whether appending sets these scales: there is one for each token and head. Others are read.
inline bool sets_scales(const OptionalTensor& scales, const Tensor& pages) {
  if (!scales) return false;
  for (int d = 0; d < 3; ++d)
    if (scales->size(d) != pages.size(d)) return false;
  return true;
}

// Whether these scales are those of single pages, and go where pages go.
inline bool are_of_pages(const OptionalTensor& scales, const Tensor& pages) {
  return scales && scales->size(0) == pages.size(0);
}

}  // namespace duplex
