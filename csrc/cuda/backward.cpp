// attention_backward: allocates the gradients and the workspace, describes the call to the kernels. One kernel computes
// dq, dk and dv by five products a pair of blocks, where there is such a kernel, no order of sums is asked for, and
// memory has room for dq in float32. Else dq, and dk with dv, are computed apart: seven products, but nothing is added
// to memory by several blocks, so the result is deterministic.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cuda/backward_memory.h"
#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"
#include "cuda/prepare.h"
#include "cuda/variants.h"

namespace duplex {
namespace {

bool last_is_contiguous(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }

Tensor row_contiguous(const Tensor& t) { return last_is_contiguous(t) ? t : torch::stable::contiguous(t); }

Entries entries_of(const BackwardVariant& v, int32_t most, bool keys) {
  const int32_t block = keys ? v.block_n : v.block_m;
  return {(most + block - 1) / block, v.block_m, v.block_n, keys};
}

// Ranks the entries, and fills `tiles` but for the order's owner.
Tensor rank(const Lengths& lengths, const Entries& entries, int64_t heads, int32_t section, const Tensor& on,
            void* stream, Tiles& tiles) {
  const int64_t count = entries.count(lengths);
  expect(count < FAR, "at most 2^29 blocks of rows");
  tiles = {entries, {}, int32_t(heads), section};
  if (all_alike(lengths)) return new_int(on, {0});
  Tensor order = new_int(on, {Order::size(count)});
  tiles.order = {static_cast<int32_t*>(order.data_ptr())};
  if (count > 0) schedule(lengths, entries, tiles.order, stream);
  return order;
}

// The gradient of distance_bias, to `to`, and dq where it is wanted: the launches of the dq kernel.
void sum_distances(BackwardLaunch& l, const BackwardVariant& variant, const BackwardMemory& memory, const Tensor& to) {
  BackwardArguments& a = l.arguments;
  DistanceSums& s = a.distances;
  Tiles& t = a.row_tiles;
  const int32_t heads = t.heads;
  const int64_t tiles = t.entries.count(a.lengths) * heads;
  const int64_t bytes = std::clamp(memory.tensors / SLOT_SHARE, LITTLE, SLOT_BYTES);
  s = distance_sums(tiles, l.processors, heads, a.terms.radius, std::max(a.lengths.max_q, a.lengths.max_k), bytes);
  const int32_t at_once = s.heads;
  const Tensor slots = new_float(to, {s.place(s.count, 0)});
  s.slots = static_cast<float*>(slots.data_ptr());
  for (s.first_head = 0; s.first_head < heads; s.first_head += at_once) {
    s.heads = t.heads = std::min(at_once, heads - s.first_head);
    if (tiles > 0) variant.launch(l);
    add_distances(s, static_cast<float*>(to.data_ptr()), a.terms.radius, l.stream);
  }
}

}  // namespace

Gradients attention_backward(Tensor dout, OptionalTensor dlse, Tensor out, Tensor lse, DUPLEX_CALL_PARAMETERS,
                             int64_t output_mask) {
  const CallArguments call DUPLEX_CALL_ARGUMENTS;
  check_call(call);
  const auto wanted = [&](int n) { return (output_mask >> n & 1) != 0; };
  expect((output_mask & ~0x97) == 0, "no gradients but those of q, k, v, distance_bias and sink");
  const bool packed = call.packed(), queries = wanted(0), keys = wanted(1) || wanted(2), distances = wanted(4);
  dout = row_contiguous(dout);
  out = row_contiguous(out);
  lse = torch::stable::contiguous(lse);
  if (dlse) dlse = torch::stable::contiguous(*dlse);

  const int64_t d = q.dim(), rows_q = q.size(d - 3), heads = call.heads_q(), heads_kv = k.size(d - 2);
  const int64_t head_dim = q.size(d - 1), dim_v = v.size(d - 1), batch = packed ? 1 : q.size(0);
  const Device device(device_index(q));
  const auto none = [&] { return new_float(q, {0}); };
  Tensor dq = queries ? new_like(q) : none(), dk = keys ? new_like(k) : none(), dv = keys ? new_like(v) : none(),
         ddistance = distances ? new_like(*distance_bias) : none(), dsink = wanted(7) ? new_like(*sink) : none();

  BackwardLaunch l{};
  BackwardArguments& a = l.arguments;
  a.lengths = lengths_of(call);
  a.terms = terms_of(head_dim, scale, softcap, distance_bias, alibi_slopes);
  a.group = int32_t(heads_kv ? heads / heads_kv : 1);
  a.head_dim = int32_t(head_dim);
  a.head_dim_v = int32_t(dim_v);
  l.bfloat16 = is_bfloat16(q);
  l.terms = has_terms(a.terms);
  l.processors = device.processors;
  l.stream = device.stream;

  const int64_t sum_rows_a_head = RowSums::rows(a.lengths), numbers = heads * sum_rows_a_head;
  const Tensor sums = new_float(q, {2, heads, sum_rows_a_head});
  float* references = static_cast<float*>(sums.data_ptr());
  a.sums = {references, references + numbers, sum_rows_a_head};
  const bool bulk = has_bulk_rows(dout), whole = bulk && has_bulk_rows(out) && dim_v % 8 == 0;
  Tensor readable = dout;
  if (!bulk) {
    Sizes sizes = sizes_of(dout);
    sizes.back() = (dim_v + 7) / 8 * 8;
    readable = new_tensor(dout, sizes);
  }
  const int64_t wider = std::max(head_dim, dim_v);
  const BackwardVariant* fused = nullptr;
  if (!deterministic && !distances && dq.numel() > 0 && dk.numel() > 0 && dv.numel() > 0 && a.lengths.max_k > 0)
    fused = fused_variant(device.capability, wider);
  const BackwardMemory memory{4 * (q.numel() + k.numel() + v.numel() + out.numel()) + 4 * lse.numel() * (dlse ? 2 : 1),
                              8 * numbers + (bulk ? 0 : 2 * readable.numel())};
  if (fused && !memory.has_room_for(4 * numbers * fused->head_dim)) fused = nullptr;
  // Cleared first: what a launch made ahead overlaps with is then a kernel of ours.
  Tensor dq_sums = fused ? new_float(q, {numbers, fused->head_dim}) : none();
  if (fused) {
    torch::stable::zero_(dq_sums);
    a.dq_sums = static_cast<float*>(dq_sums.data_ptr());
  }
  l.ahead = numbers > 0 && device.overlaps;
  if (numbers > 0)
    sum_rows({a.lengths, int32_t(heads), a.head_dim_v, rows_of(dout), rows_of(out),
              static_cast<const float*>(lse.const_data_ptr()), data<float>(dlse), packed ? 0 : heads * rows_q, rows_q,
              a.sums, bulk ? Rows{} : rows_of(readable)},
             l.bfloat16, whole, l.processors, l.stream);

  const Tensor& instead = q.numel() ? q : k;
  l.q = box_of(q, instead);
  l.k = box_of(k, instead);
  l.v = box_of(v, instead);
  l.dout = box_of(readable, instead);
  const int64_t width = 2 * (head_dim + dim_v);  // bytes of a row of both
  const auto clear = [&](const Tensor& t, bool of_keys) {
    if (packed || (of_keys ? seqlens_k || starts_k : seqlens_q || starts_q))
      clear_outside({a.lengths, of_keys, int32_t(t.size(d - 2)), int32_t(t.size(d - 1)), rows_of(t), nullptr, 0, 0},
                    l.processors, l.stream);
  };
  if (dq.numel() > 0) {
    a.dq = rows_of(dq);
    clear(dq, false);
  }
  if ((dq.numel() > 0 || distances) && !fused) {
    const BackwardVariant& variant = dq_variant(device.capability, wider);
    const int64_t read = k.size(d - 3) * (packed ? 1 : batch) * width;
    const Tensor order = rank(a.lengths, entries_of(variant, a.lengths.max_q, false), heads,
                              section_of(heads, a.group, read), q, l.stream, a.row_tiles);
    // dS as dq has it is bent by the soft cap, as distances have it is not.
    if (dq.numel() > 0 && a.row_tiles.entries.count(a.lengths) > 0 && (!distances || softcap > 0)) variant.launch(l);
    if (softcap > 0) a.dq = {};
    if (distances) sum_distances(l, variant, memory, ddistance);
  }
  if (dk.numel() > 0 || dv.numel() > 0) {
    const BackwardVariant& variant = fused ? *fused : dkdv_variant(device.capability, wider);
    const int64_t read = rows_q * batch * a.group * width;
    const Tensor order = rank(a.lengths, entries_of(variant, a.lengths.max_k, true), heads_kv,
                              section_of(heads_kv, 1, read), q, l.stream, a.key_tiles);
    a.dk = rows_of(dk);
    a.dv = rows_of(dv);
    clear(dk, true);
    clear(dv, true);
    if (a.key_tiles.entries.count(a.lengths) > 0) variant.launch(l);
  }
  if (wanted(7))
    sink_gradient({a.lengths, data<float>(sink), a.sums, static_cast<float*>(dsink.data_ptr())}, int(heads), l.stream);
  if (!wanted(1)) dk = none();
  if (!wanted(2)) dv = none();
  return {dq, dk, dv, none(), ddistance, none(), none(), dsink};
}

}  // namespace duplex
