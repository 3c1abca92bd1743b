// dq for one head_dim, DUPLEX_HEAD_DIM.
#include "cuda/sm90/dq.cuh"
#include "cuda/sm90/launch_backward.cuh"

namespace duplex::sm90 {
namespace {

using Built = QueryShape<DUPLEX_HEAD_DIM>;

template <class T, bool TERMS, bool DISTANCES>
void launch_kernel(const BackwardLaunch& l, const BackwardMaps& maps) {
  constexpr int TEAMS = Built::WARPGROUPS;
  constexpr int SHARED = SHARED_WITH_TICKETS<Built, Work> + DISTANCES * TEAMS * Diagonals<16, Built::BLOCK_N>::BYTES;
  static_assert(SHARED <= 227 * 1024);
  const int blocks = DISTANCES ? l.arguments.distances.count / TEAMS : blocks_of(l, l.arguments.row_tiles);
  launch<dq_kernel<T, Built, TERMS, DISTANCES>>("dq", blocks, Built::THREADS, SHARED, Stream{l.stream, l.ahead},
                                                l.arguments, maps);
}

template <class T>
void launch_type(const BackwardLaunch& l, const BackwardMaps& maps) {
  if (l.arguments.distances.slots)
    launch_kernel<T, true, true>(l, maps);
  else
    l.terms ? launch_kernel<T, true, false>(l, maps) : launch_kernel<T, false, false>(l, maps);
}

void launch_dq(BackwardLaunch& l) {
  const BackwardMaps maps = maps_of<Built>(l);
  l.bfloat16 ? launch_type<Bfloat16>(l, maps) : launch_type<Float16>(l, maps);
}

}  // namespace

extern const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM);
const BackwardVariant DUPLEX_NAME(DQ_, DUPLEX_HEAD_DIM) = {Built::HEAD_DIM, Built::BLOCK_M, Built::BLOCK_N, &launch_dq};

}  // namespace duplex::sm90
