// The forward for one head_dim, DUPLEX_HEAD_DIM.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/variants.h"

namespace duplex::sm90 {

template <class T, class S, bool TERMS>
void launch_kernel(const ForwardLaunch& l, const Maps& maps) {
  const int64_t tiles = l.arguments.entries.count(l.arguments.lengths) * l.arguments.heads_q;
  const int blocks = int(std::min<int64_t>(tiles, l.processors));
  launch<forward_kernel<T, S, TERMS>>("forward", blocks, S::THREADS, SHARED_WITH_TICKETS<S, Work>,
                                      Stream{l.stream, l.ahead}, l.arguments, maps);
}

template <class S>
void launch_forward(ForwardLaunch& l) {
  l.q.columns = l.k.columns = l.v.columns = S::Keys::PANEL;
  l.q.rows = S::BLOCK_M;
  l.k.rows = l.v.rows = S::BLOCK_N;
  const Maps maps{encode(l.q), encode(l.k), encode(l.v)};
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, S, true>(l, maps) : launch_kernel<Bfloat16, S, false>(l, maps);
  else
    l.terms ? launch_kernel<Float16, S, true>(l, maps) : launch_kernel<Float16, S, false>(l, maps);
}

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
using Built = Shape<DUPLEX_HEAD_DIM>;
extern const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM);
const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                        &launch_forward<Built>};

}  // namespace duplex::sm90
