// dk and dv for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/dkdv.cuh"
#include "cuda/sm90/launch_backward.cuh"

namespace duplex::sm90 {
namespace {

using Built = KeyShape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS>
void launch_kernel(const BackwardLaunch& l, const BackwardMaps& maps) {
  launch<dkdv_kernel<T, Built, TERMS>>("dkdv", blocks_of(l, l.arguments.key_tiles), Built::THREADS,
                                       SHARED_WITH_TICKETS<Built, KeyWork>, Stream{l.stream, l.ahead}, l.arguments,
                                       maps);
}

void launch_dkdv(BackwardLaunch& l) {
  const BackwardMaps maps = maps_of<Built>(l);
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, true>(l, maps) : launch_kernel<Bfloat16, false>(l, maps);
  else
    l.terms ? launch_kernel<Float16, true>(l, maps) : launch_kernel<Float16, false>(l, maps);
}

}  // namespace

extern const BackwardVariant DUPLEX_NAME(DKDV_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(DKDV_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                             &launch_dkdv};

}  // namespace duplex::sm90
