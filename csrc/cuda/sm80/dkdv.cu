// dk and dv for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm80/dkdv.cuh"
#include "cuda/sm80/launch.cuh"

namespace duplex::sm80 {
namespace {

using Built = KeyShape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS>
void launch_kernel(const BackwardLaunch& l) {
  const Tiles& t = l.arguments.key_tiles;
  launch<dkdv_kernel<T, Built, TERMS>>("dkdv", blocks_of(t.entries.count(l.arguments.lengths) * t.heads, l.processors),
                                       Built::THREADS, Built::SHARED_BYTES, l.stream, l.arguments,
                                       Sources{source_of(l.q), source_of(l.k), source_of(l.v), source_of(l.dout)});
}

void launch_dkdv(BackwardLaunch& l) {
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, true>(l) : launch_kernel<Bfloat16, false>(l);
  else
    l.terms ? launch_kernel<Float16, true>(l) : launch_kernel<Float16, false>(l);
}

}  // namespace

extern const BackwardVariant DUPLEX_NAME(DKDV_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(DKDV_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                             &launch_dkdv};

}  // namespace duplex::sm80
