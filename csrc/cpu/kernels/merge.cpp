// Exact union of attentions over disjoint keys: each part weighted by its share of the sum of exponentials.
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/pack.h"

namespace duplex::DUPLEX_ISA {
namespace {

template <class E>
void merge_rows(const MergeProblem& p, int64_t b, int64_t h) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const auto lse_of = [&](const MergePart& part) {
      return part.lse[b * part.lse_batch + h * part.lse_head + i * part.lse_row];
    };
    float top = -INF, total = 0;
    for (int n = 0; n < p.count; ++n) top = lse_of(p.parts[n]) > top ? lse_of(p.parts[n]) : top;
    for (int n = 0; n < p.count; ++n) total += top == -INF ? 0 : __builtin_expf(lse_of(p.parts[n]) - top);
    p.lse[b * p.lse_batch + h * p.lse_head + i] = top == -INF ? -INF : top + __builtin_logf(total);
    E* to = p.out.at<E>(b, i, h);
    for (int64_t x = 0; x < p.dim; x += LANES) {
      const int count = int(p.dim - x < LANES ? p.dim - x : LANES);
      vfloat sum{};
      for (int n = 0; n < p.count && top > -INF; ++n) {
        const float weight = __builtin_expf(lse_of(p.parts[n]) - top) / total;
        if (weight > 0) sum += widen_partial(p.parts[n].out.at<E>(b, i, h) + x, count) * weight;
      }
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
