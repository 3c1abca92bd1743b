// attention_forward: allocates the outputs and the workspace, describes the call to the kernels.
#include <algorithm>
#include <string>

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/prepare.h"
#include "cuda/variants.h"

namespace duplex {

std::string forward_tile(int64_t capability, int64_t head_dim) {
  const Variant& v = forward_variant(capability, head_dim);
  return std::to_string(v.block_m) + "x" + std::to_string(v.block_n) + " of head_dim " + std::to_string(v.head_dim);
}

std::tuple<Tensor, Tensor> attention_forward(DUPLEX_CALL_PARAMETERS) {
  const CallArguments call DUPLEX_CALL_ARGUMENTS;
  check_call(call);
  const bool packed = call.packed();
  const int64_t rows = q.size(q.dim() - 3), heads = call.heads_q(), head_dim = q.size(q.dim() - 1);
  const int64_t heads_kv = k.size(k.dim() - 2), dim_v = v.size(v.dim() - 1), batch = packed ? 1 : q.size(0);
  const int64_t rows_k = k.size(k.dim() - 3) * (packed ? 1 : batch);
  const Device device(device_index(q));
  Tensor out = packed ? new_tensor(q, {rows, heads, dim_v}) : new_tensor(q, {batch, rows, heads, dim_v});
  Tensor lse = packed ? new_float(q, {heads, rows}) : new_float(q, {batch, heads, rows});
  if (batch * rows * heads == 0) return {std::move(out), std::move(lse)};

  const Variant& chosen = forward_variant(device.capability, std::max(head_dim, dim_v));
  ForwardLaunch l{};
  ForwardArguments& a = l.arguments;
  a.lengths = lengths_of(call);
  a.terms = terms_of(head_dim, scale, softcap, distance_bias, alibi_slopes);
  a.sink = data<float>(sink);
  a.heads_q = int32_t(heads);
  a.group = int32_t(heads / heads_kv);
  a.section = section_of(heads, a.group, 2 * rows_k * (head_dim + dim_v));
  a.head_dim_v = int32_t(dim_v);
  a.entries = {(a.lengths.max_q + chosen.block_m - 1) / chosen.block_m, chosen.block_m, chosen.block_n, false};
  const int64_t entries = a.entries.count(a.lengths);
  expect(entries < FAR, "at most 2^29 blocks of rows");
  const bool ranked = !all_alike(a.lengths);
  const Tensor order = new_int(q, {ranked ? Order::size(entries) : 0});
  if (ranked) a.order = {static_cast<int32_t*>(order.data_ptr())};
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
  l.bfloat16 = is_bfloat16(q);
  l.terms = has_terms(a.terms);
  l.processors = device.processors;
  l.stream = device.stream;
  if (packed || seqlens_q || starts_q) {
    const int32_t columns = a.head_dim_v;
    clear_outside({a.lengths, false, a.heads_q, columns, a.rows(), a.lse, a.lse_batch, a.lse_head}, l.processors,
                  l.stream);
  }
  if (entries > 0) {
    l.ahead = ranked && device.overlaps;
    if (ranked) schedule(a.lengths, a.entries, a.order, l.stream);
    chosen.launch(l);
  }
  return {std::move(out), std::move(lse)};
}

}  // namespace duplex
