#include "cuda/call.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace duplex {

using torch::headeronly::ScalarType;

namespace {
constexpr int64_t L2_BYTES = 32 << 20;  // of what is read again and again at one time
}  // namespace

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("duplex_attn_cuda: ") + what);
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::FLOAT32;
    case ScalarType::Half: return DType::FLOAT16;
    case ScalarType::BFloat16: return DType::BFLOAT16;
    default: throw std::invalid_argument("duplex_attn_cuda: float32, float16 or bfloat16");
  }
}

bool is_bfloat16(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  expect(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "q, k and v are bfloat16 or float16");
  return dtype == ScalarType::BFloat16;
}

void check_call(const CallArguments& call) {
  expect(!call.bias && call.dropout_p == 0, "no bias and no dropout");
  expect(!call.row_distance_bias && !call.col_distance_bias, "no row_distance_bias and no col_distance_bias");
}

bool aligned(const Tensor& t, int64_t bytes) {
  uint64_t all = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  for (int d = 0; d < t.dim() - 1; ++d) all |= uint64_t(t.stride(d)) * element_size(t);
  return all % bytes == 0;
}

// A size of 1 says nothing by its stride.
bool has_bulk_rows(const Tensor& t) {
  if (t.numel() == 0) return true;
  if (t.stride(t.dim() - 1) != 1 && t.size(t.dim() - 1) > 1) return false;
  for (int64_t n = 0; n < t.dim() - 1; ++n)
    if (t.size(n) > 1 && (t.stride(n) <= 0 || t.stride(n) * element_size(t) % 16 != 0)) return false;
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// An empty tensor is never read, but has a map.
Box box_of(const Tensor& t, const Tensor& instead) {
  expect(has_bulk_rows(t), "q, k and v begin on 16 bytes, and so do their rows");
  const int64_t d = t.dim(), empty = t.numel() == 0;
  Box box{empty ? instead.const_data_ptr() : t.const_data_ptr(), {1, 1, 1, 1}, {2, 16, 16, 16}, 0, 0};
  const int64_t at[4] = {d - 1, d - 3, d - 2, d - 4};
  for (int n = 0; n < (empty ? 0 : int(d)); ++n) {
    box.size[n] = n > 0 ? t.size(at[n]) : t.size(at[n]) * element_size(t) / 2;
    if (n > 0 && box.size[n] > 1) box.stride[n] = element_size(t) * t.stride(at[n]);
  }
  return box;
}

Rows rows_of(const Tensor& t) {
  const int64_t d = t.dim();
  return {const_cast<void*>(t.const_data_ptr()), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}

int32_t bound_of(std::optional<int64_t> distance) {
  return int32_t(std::clamp<int64_t>(distance.value_or(FAR), -FAR, FAR));
}

Lengths lengths_of(const CallArguments& call) {
  Lengths l{};
  l.cu_q = data<int32_t>(call.cu_seqlens_q);
  l.cu_k = data<int32_t>(call.cu_seqlens_k);
  l.len_q = data<int32_t>(call.seqlens_q);
  l.len_k = data<int32_t>(call.seqlens_k);
  l.start_q = data<int32_t>(call.starts_q);
  l.start_k = data<int32_t>(call.starts_k);
  l.prefix = data<int32_t>(call.prefix);
  const int64_t rows_q = call.q.size(call.q.dim() - 3), rows_k = call.k.size(call.k.dim() - 3);
  const int64_t batch = call.packed() ? call.cu_seqlens_q->size(0) - 1 : call.q.size(0);
  expect(rows_q < FAR && rows_k < FAR && batch < FAR, "at most 2^29 rows");
  l.batch = int32_t(batch);
  l.rows_q = int32_t(rows_q);
  l.rows_k = int32_t(rows_k);
  l.max_q = call.packed() ? int32_t(std::min(call.max_seqlen_q, rows_q)) : l.rows_q;
  l.max_k = call.packed() ? int32_t(std::min(call.max_seqlen_k, rows_k)) : l.rows_k;
  l.left = bound_of(call.left);
  l.right = bound_of(call.right);
  l.top_left = call.top_left;
  return l;
}

Terms terms_of(int64_t head_dim, std::optional<double> scale, double softcap, const OptionalTensor& distance_bias,
               const OptionalTensor& alibi_slopes) {
  Terms t{};
  t.scale = float(scale ? *scale : 1.0 / std::sqrt(double(head_dim)));
  t.softcap = float(softcap);
  t.distance_bias = data<float>(distance_bias);
  t.radius = distance_bias ? int32_t(distance_bias->size(1) / 2) : 0;
  t.alibi_slopes = data<float>(alibi_slopes);
  return t;
}

bool has_terms(const Terms& t) { return t.softcap > 0 || t.distance_bias || t.alibi_slopes || t.scale <= 0; }

int32_t section_of(int64_t heads, int64_t group, int64_t bytes) {
  return int32_t(std::min(heads, group * std::max<int64_t>(1, L2_BYTES / std::max<int64_t>(1, bytes))));
}

}  // namespace duplex
