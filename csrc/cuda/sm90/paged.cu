// Attention over pages for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/launch_paged.cuh"
#include "cuda/sm90/paged.cuh"

namespace duplex::sm90 {
namespace {

using Built = Shape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS>
void launch_kernel(const PagedLaunch& l, const PagedArguments& a) {
  const int blocks = blocks_of(l, a.grid, 1);
  launch<paged_kernel<T, Built, TERMS>>("paged attention", blocks, Built::THREADS, Built::SHARED_BYTES, l.stream, a);
}

void launch_paged(const PagedLaunch& l, paged::Which which, int32_t units) {
  const PagedArguments a = arguments_of<Built>(l, which, units);
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, true>(l, a) : launch_kernel<Bfloat16, false>(l, a);
  else
    l.terms ? launch_kernel<Float16, true>(l, a) : launch_kernel<Float16, false>(l, a);
}

}  // namespace

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
extern const PagedVariant DUPLEX_NAME(PAGED_, DUPLEX_HEAD_DIM);
const PagedVariant DUPLEX_NAME(PAGED_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N, 1,
                                                           &launch_paged};

}  // namespace duplex::sm90
