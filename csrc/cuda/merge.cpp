#include "cuda/merge.h"

#include "cuda/call.h"
#include "cuda/device.h"
#include "cuda/operators.h"

namespace duplex {

std::tuple<Tensor, Tensor> merge_attention(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  expect(outs.size() <= size_t(MERGE_PARTS), "at most 32 parts in one merge");
  const Tensor& like = outs[0];
  const int64_t d = like.dim(), rows = like.size(d - 3), heads = like.size(d - 2), dim = like.size(d - 1);
  const bool dense = d == 4;
  const int64_t batch = dense ? like.size(0) : 1;
  expect(batch * rows * heads < int64_t(1) << 32, "at most 2^32 rows");
  expect(dim > 0 && dim <= 256, "a head_dim of 1 to 256");
  const Device device(device_index(like));
  Tensor out = dense ? new_tensor(like, {batch, rows, heads, dim}) : new_tensor(like, {rows, heads, dim});
  Tensor lse = dense ? new_float(like, {batch, heads, rows}) : new_float(like, {heads, rows});
  if (batch * rows * heads == 0) return {std::move(out), std::move(lse)};
  Merge m{};
  m.count = int32_t(outs.size());
  for (int n = 0; n < m.count; ++n) {
    if (outs[n].stride(d - 1) != 1 && dim > 1) outs[n] = torch::stable::contiguous(outs[n]);
    const Tensor& l = lses[n];
    m.parts[n] = {view(outs[n]), static_cast<const float*>(l.const_data_ptr()), dense ? l.stride(0) : 0,
                  l.stride(l.dim() - 2), l.stride(l.dim() - 1)};
  }
  m.heads = int32_t(heads);
  m.dim = int32_t(dim);
  m.batch = batch;
  m.rows = rows;
  m.dtype = dtype_of(like);
  m.out = out.data_ptr();
  m.lse = static_cast<float*>(lse.data_ptr());
  merge(m, device.stream);
  return {std::move(out), std::move(lse)};
}

}  // namespace duplex
