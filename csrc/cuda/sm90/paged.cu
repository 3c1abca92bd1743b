// Attention over pages for one head_dim, DUPLEX_HEAD_DIM.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm90/paged.cuh"
#include "cuda/sm90/paged.h"

namespace duplex::sm90 {
namespace {

using Built = Shape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS>
void launch_kernel(const PagedLaunch& l, const PagedArguments& a) {
  const int chunks = paged::packing(a.call.group(), Built::BLOCK_M).chunks, shares = a.units * a.call.heads_kv * chunks;
  // A plan's tiles are ranked, so blocks take one after the other; others the hardware hands out.
  const int blocks = a.call.plan ? std::min(shares, l.processors) : shares;
  launch<paged_kernel<T, Built, TERMS>>("paged attention", blocks, Built::THREADS, Built::SHARED_BYTES, l.stream, a);
}

void launch_paged(const PagedLaunch& l, paged::Which which, int32_t units) {
  Box k = l.k, v = l.v;
  k.columns = v.columns = Built::Keys::PANEL;
  const PagedArguments a{l.call, {encode(k), encode(v), k.rows}, which, units};
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, true>(l, a) : launch_kernel<Bfloat16, false>(l, a);
  else
    l.terms ? launch_kernel<Float16, true>(l, a) : launch_kernel<Float16, false>(l, a);
}

}  // namespace

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
extern const PagedVariant DUPLEX_NAME(PAGED_, DUPLEX_HEAD_DIM);
const PagedVariant DUPLEX_NAME(PAGED_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                           &launch_paged};

}  // namespace duplex::sm90
