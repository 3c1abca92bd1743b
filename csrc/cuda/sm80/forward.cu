// The forward for one head_dim, DUPLEX_HEAD_DIM.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/sm80/forward.cuh"
#include "cuda/sm80/forward.h"

namespace duplex::sm80 {

// Hardware hands blocks to multiprocessors as they become free; beyond so many, blocks walk over tiles.
constexpr int BLOCKS_A_PROCESSOR = 8;

inline Source source_of(const Box& box) {
  return {static_cast<const char*>(box.data), box.stride[1], box.stride[2], box.stride[3], int32_t(2 * box.size[0])};
}

template <class T, class S, bool TERMS>
void launch_kernel(const ForwardLaunch& l) {
  const int64_t tiles = l.arguments.entries.count(l.arguments.lengths) * l.arguments.heads_q;
  const int blocks = int(std::min<int64_t>(tiles, int64_t(l.processors) * BLOCKS_A_PROCESSOR));
  launch<forward_kernel<T, S, TERMS>>("forward", blocks, S::THREADS, S::SHARED_BYTES, l.stream, l.arguments,
                                      Sources{source_of(l.q), source_of(l.k), source_of(l.v)});
}

template <class S>
void launch_forward(ForwardLaunch& l) {
  if (l.bfloat16)
    l.terms ? launch_kernel<Bfloat16, S, true>(l) : launch_kernel<Bfloat16, S, false>(l);
  else
    l.terms ? launch_kernel<Float16, S, true>(l) : launch_kernel<Float16, S, false>(l);
}

#define DUPLEX_JOIN(a, b) a##b
#define DUPLEX_NAME(a, b) DUPLEX_JOIN(a, b)
using Built = Shape<DUPLEX_HEAD_DIM>;
extern const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM);
const Variant DUPLEX_NAME(FORWARD_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N,
                                                        &launch_forward<Built>};

}  // namespace duplex::sm80
