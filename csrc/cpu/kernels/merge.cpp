// Exact union of attentions over disjoint keys: each part weighted by its share of the sum of exponentials.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/pack.h"
#include "cpu/kernels/union.h"

namespace duplex::DUPLEX_ISA {
namespace {

template <class E>
void merge_rows(const MergeProblem& p, int64_t b, int64_t h) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const auto lse_of = [&](int n) {
      const MergePart& part = p.parts[n];
      return part.lse[b * part.lse_batch + h * part.lse_head + i * part.lse_row];
    };
    const Union parts(p.count, lse_of, nullptr);
    p.lse[b * p.lse_batch + h * p.lse_head + i] = parts.lse();
    E* to = p.out.at<E>(b, i, h);
    for (int64_t x = 0; x < p.dim; x += LANES) {
      const int count = int(p.dim - x < LANES ? p.dim - x : LANES);
      vfloat sum{};
      for (int n = 0; n < p.count; ++n)  // not 0 * NaN
        if (const float share = parts.share(n); share != 0)
          sum += widen_partial(p.parts[n].out.at<E>(b, i, h) + x, count) * share;
      narrow_partial(to + x, sum, count);
    }
  }
}

}  // namespace

const MergeKernel merge = {[](const MergeProblem& p, int64_t b, int64_t h) {
  switch (p.dtype) {
    case DType::FLOAT32: return merge_rows<float>(p, b, h);
    case DType::FLOAT16: return merge_rows<f16>(p, b, h);
    case DType::BFLOAT16: return merge_rows<bf16>(p, b, h);
    case DType::BOOL: return;
  }
}};

}  // namespace duplex::DUPLEX_ISA
