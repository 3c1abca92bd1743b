// dq for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/dq.cuh"
#include "cuda/sm90/launch_backward.cuh"

namespace duplex::sm90 {
namespace {

using Built = QueryShape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS>
void launch_kernel(const BackwardLaunch& l, const BackwardMaps& maps) {
  launch<dq_kernel<T, Built, TERMS>>("dq", blocks_of(l, l.arguments.row_tiles), Built::THREADS, Built::SHARED_BYTES,
                                     l.stream, l.arguments, maps);
}

void launch_dq(BackwardLaunch& l) {
  const BackwardMaps maps = maps_of<Built>(l);
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, true>(l, maps) : launch_kernel<Bfloat16, false>(l, maps);
  else
    l.terms ? launch_kernel<Float16, true>(l, maps) : launch_kernel<Float16, false>(l, maps);
}

}  // namespace

extern const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N, &launch_dq};

}  // namespace duplex::sm90
