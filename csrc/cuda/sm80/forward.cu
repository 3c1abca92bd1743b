// The forward for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/launch.cuh"

namespace duplex::sm80 {

template <class T, class S, bool TERMS>
void launch_kernel(const ForwardLaunch& l) {
  const int64_t tiles = l.arguments.entries.count(l.arguments.lengths) * l.arguments.heads_q;
  launch<forward_kernel<T, S, TERMS>>("forward", blocks_of(tiles, l.processors), S::THREADS, S::SHARED_BYTES, l.stream,
                                      l.arguments, Sources{source_of(l.q), source_of(l.k), source_of(l.v), {}});
}

template <class S>
void launch_forward(ForwardLaunch& l) {
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, S, true>(l) : launch_kernel<Bfloat16, S, false>(l);
  else
    l.terms ? launch_kernel<Float16, S, true>(l) : launch_kernel<Float16, S, false>(l);
}

using Built = Shape<DUPLEX_HEAD_DIM>;
extern const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM);
const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                        &launch_forward<Built>};

}  // namespace duplex::sm80
