#include "cpu/merge.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace duplex {

std::tuple<Tensor, Tensor> merge_attention(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  const Tensor& like = outs[0];
  const int64_t d = like.dim(), heads = like.size(d - 2), dim = like.size(d - 1), rows = like.size(d - 3);
  const bool dense = d == 4;
  Tensor out = dense ? new_tensor(like, {like.size(0), rows, heads, dim}) : new_tensor(like, {rows, heads, dim});
  Tensor lse = dense ? new_float(like, {like.size(0), heads, rows}) : new_float(like, {heads, rows});
  std::vector<MergePart> parts;
  for (size_t n = 0; n < outs.size(); ++n) {
    if (outs[n].stride(d - 1) != 1 && dim > 1) outs[n] = torch::stable::contiguous(outs[n]);
    const Tensor& l = lses[n];
    parts.push_back({view(outs[n]), static_cast<const float*>(l.const_data_ptr()), dense ? l.stride(0) : 0,
                     l.stride(l.dim() - 2), l.stride(l.dim() - 1)});
  }
  const MergeProblem p{dtype_of(like),
                       int(parts.size()),
                       parts.data(),
                       rows,
                       dim,
                       view(out),
                       static_cast<float*>(lse.data_ptr()),
                       dense ? heads * rows : 0,
                       rows};
  const MergeKernel& kernel = *current_isa().merge;
  parallel_tasks((dense ? like.size(0) : 1) * heads, 0,
                 [&](int64_t index, void*) { kernel.run(p, index / heads, index % heads); });
  return {std::move(out), std::move(lse)};
}

}  // namespace duplex
