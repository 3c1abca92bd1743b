#include "cpu/call.h"

#include <cmath>
#include <stdexcept>

namespace duplex {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::FLOAT32;
    case ScalarType::Half: return DType::FLOAT16;
    case ScalarType::BFloat16: return DType::BFLOAT16;
    case ScalarType::Bool: return DType::BOOL;
    default: throw std::invalid_argument("the CPU kernels take float32, float16 and bfloat16");
  }
}

namespace {

BiasView bias_view(const OptionalTensor& t) {
  BiasView view;
  if (!t) return view;
  view.data = t->data_ptr();
  view.dtype = dtype_of(*t);
  int64_t* const strides[4] = {&view.batch, &view.head, &view.row, &view.col};
  for (int d = 0; d < 4; ++d) *strides[d] = t->size(d) == 1 ? 0 : t->stride(d);
  return view;
}

}  // namespace

RowTable row_table(const OptionalTensor& t) {
  if (!t) return {};
  return {t->data_ptr(), dtype_of(*t), t->stride(0), t->stride(1), t->stride(2), t->stride(3), t->size(3) / 2};
}

void set_scores(Problem& p, const OptionalTensor& bias, const OptionalTensor& distance_bias,
                const OptionalTensor& alibi_slopes, const OptionalTensor& row_distance_bias,
                const OptionalTensor& col_distance_bias, const OptionalTensor& sink, std::optional<double> scale,
                double softcap) {
  p.bias = bias_view(bias);
  p.distance_bias = data<float>(distance_bias);
  p.radius = distance_bias ? distance_bias->size(1) / 2 : 0;
  p.alibi_slopes = data<float>(alibi_slopes);
  p.row_distance_bias = row_table(row_distance_bias);
  p.col_distance_bias = row_table(col_distance_bias);
  p.sink = data<float>(sink);
  p.scale = float(scale ? *scale : 1.0 / std::sqrt(double(p.head_dim)));
  p.softcap = float(softcap);
  p.keep_scale = 1;
}

Problem problem_of(const CallArguments& call, const Tensor& out, const Tensor& lse) {
  const int64_t dims = call.q.dim();
  Problem p{};
  p.dtype = dtype_of(call.q);
  p.batch = call.packed() ? call.cu_seqlens_q->size(0) - 1 : call.q.size(0);
  p.heads_q = call.q.size(dims - 2);
  p.heads_kv = call.k.size(dims - 2);
  p.head_dim = call.q.size(dims - 1);
  p.head_dim_v = call.v.size(dims - 1);
  p.rows_q = call.packed() ? call.max_seqlen_q : call.q.size(1);
  p.rows_k = call.packed() ? call.max_seqlen_k : call.k.size(1);
  p.q = view(call.q);
  p.k = view(call.k);
  p.v = view(call.v);
  p.out = view(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_batch = call.packed() ? 0 : lse.stride(0);
  p.lse_head = lse.stride(call.packed() ? 0 : 1);
  p.cu_q = data<int32_t>(call.cu_seqlens_q);
  p.cu_k = data<int32_t>(call.cu_seqlens_k);
  p.len_q = data<int32_t>(call.seqlens_q);
  p.len_k = data<int32_t>(call.seqlens_k);
  p.start_q = data<int32_t>(call.starts_q);
  p.start_k = data<int32_t>(call.starts_k);
  p.prefix = data<int32_t>(call.prefix);
  p.left = clamp(call.left.value_or(UNBOUNDED), -UNBOUNDED, UNBOUNDED);
  p.right = clamp(call.right.value_or(UNBOUNDED), -UNBOUNDED, UNBOUNDED);
  p.top_left = call.top_left;
  set_scores(p, call.bias, call.distance_bias, call.alibi_slopes, call.row_distance_bias, call.col_distance_bias,
             call.sink, call.scale, call.softcap);
  p.dropout = call.dropout_p > 0;
  p.drop_below = uint64_t(std::floor(call.dropout_p * 4294967296.0));
  p.keep_scale = call.dropout_p < 1 ? float(1.0 / (1.0 - call.dropout_p)) : 0.0f;
  p.seed = p.dropout ? uint64_t(*data<int64_t>(call.seed)) : 0;
  return p;
}

}  // namespace duplex
