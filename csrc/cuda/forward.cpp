// attention_forward: allocates the outputs and the workspace, describes the call to the kernels.
#include "cuda/operators.h"

#include <algorithm>
#include <string>

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/prepare.h"
#include "cuda/sm80/forward.h"
#include "cuda/sm90/forward.h"

namespace duplex {
namespace {

constexpr int64_t L2_BYTES = 16 << 20;  // of keys and values that are read again and again at one time

// (head_dim, row, head, batch). A size of 1 says nothing by its stride; an empty tensor is never read, but has a map.
Box box_of(const Tensor& t, const Tensor& instead) {
  const int64_t d = t.dim(), empty = t.numel() == 0;
  Box box{empty ? instead.const_data_ptr() : t.const_data_ptr(), {1, 1, 1, 1}, {2, 16, 16, 16}, 0, 0};
  const int64_t at[4] = {d - 1, d - 3, d - 2, d - 4};
  for (int n = 0; n < (empty ? 0 : int(d)); ++n) {
    box.size[n] = t.size(at[n]);
    if (n == 0 || box.size[n] == 1) continue;
    box.stride[n] = 2 * t.stride(at[n]);
    expect(box.stride[n] > 0 && box.stride[n] % 16 == 0, "strides of q, k and v are multiples of 16 bytes");
  }
  expect(t.numel() == 0 || t.stride(d - 1) == 1, "the last dimension of q, k and v is contiguous");
  expect(reinterpret_cast<uintptr_t>(box.data) % 16 == 0, "q, k and v begin on 16 bytes");
  return box;
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
  l.left = bound(call.left);
  l.right = bound(call.right);
  l.top_left = call.top_left;
  return l;
}

// Heads, in whole groups, whose keys and values of all sequences stay in the cache together.
int32_t section_of(const CallArguments& call, int64_t heads, int64_t group) {
  const int64_t d = call.k.dim(), rows = call.k.size(d - 3) * (d == 4 ? call.k.size(0) : 1);
  const int64_t bytes = 2 * rows * (call.k.size(d - 1) + call.v.size(d - 1));
  return int32_t(std::min(heads, group * std::max<int64_t>(1, L2_BYTES / std::max<int64_t>(1, bytes))));
}

// Hopper has kernels of its own, which no other card runs.
const Variant& variant(int64_t capability, int64_t head_dim) {
  expect(capability >= 80, "a card of compute capability 8.0 or more");
  return capability == 90 ? sm90::variant(head_dim) : sm80::variant(head_dim);
}

}  // namespace

std::string forward_tile(int64_t capability, int64_t head_dim) {
  const Variant& v = variant(capability, head_dim);
  return std::to_string(v.block_m) + "x" + std::to_string(v.block_n) + " of head_dim " + std::to_string(v.head_dim);
}

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS) {
  const CallArguments call DUPLEX_CALL_ARGUMENTS;
  const bool bfloat16 = is_bfloat16(q);
  expect(!bias && dropout_p == 0, "no bias and no dropout");
  expect(!row_distance_bias && !col_distance_bias, "no row_distance_bias and no col_distance_bias");

  const bool packed = call.packed();
  const int64_t rows = q.size(q.dim() - 3), heads = call.heads_q(), head_dim = q.size(q.dim() - 1);
  const int64_t heads_kv = k.size(k.dim() - 2), dim_v = v.size(v.dim() - 1), batch = packed ? 1 : q.size(0);
  const Device device(device_index(q));
  Tensor out = packed ? new_tensor(q, {rows, heads, dim_v}) : new_tensor(q, {batch, rows, heads, dim_v});
  Tensor lse = packed ? new_float(q, {heads, rows}) : new_float(q, {batch, heads, rows});
  if (batch * rows * heads == 0) return {std::move(out), std::move(lse)};

  const Variant& chosen = variant(device.capability, std::max(head_dim, dim_v));
  ForwardLaunch l{};
  ForwardArguments& a = l.arguments;
  a.lengths = lengths_of(call);
  a.terms = terms_of(head_dim, scale, softcap, distance_bias, alibi_slopes);
  a.sink = data<float>(sink);
  a.heads_q = int32_t(heads);
  a.group = int32_t(heads / heads_kv);
  a.section = section_of(call, heads, a.group);
  a.head_dim_v = int32_t(dim_v);
  a.entries = {(a.lengths.max_q + chosen.block_m - 1) / chosen.block_m, chosen.block_m, chosen.block_n};
  const int64_t entries = a.entries.count(a.lengths);
  expect(entries < FAR, "at most 2^29 blocks of rows");
  const Tensor order = new_int(q, {1 + entries});
  a.order = static_cast<const int32_t*>(order.const_data_ptr());
  a.out = out.data_ptr();
  a.out_batch = packed ? 0 : rows * heads * dim_v;
  a.out_row = heads * dim_v;
  a.out_head = dim_v;
  a.lse = static_cast<float*>(lse.data_ptr());
  a.lse_batch = packed ? 0 : heads * rows;
  a.lse_head = rows;
  l.q = box_of(q, q);
  l.k = box_of(k, q);
  l.v = box_of(v, q);
  l.bfloat16 = bfloat16;
  l.terms = softcap > 0 || distance_bias || alibi_slopes || a.terms.scale <= 0;
  l.processors = device.processors;
  l.stream = device.stream;
  if (packed || seqlens_q || starts_q) clear_outside(a, l.processors, l.stream);
  if (entries > 0) {
    schedule(a.lengths, a.entries, static_cast<int32_t*>(order.data_ptr()), l.stream);
    chosen.launch(l);
  }
  return {std::move(out), std::move(lse)};
}

}  // namespace duplex
